"""Streaming the base: quantized decoder layers stay in host memory, or on the disk, and pass through the GPU.

Each layer's codes and scales are one run of bytes, of which a copy comes into a ring of three buffers on the GPU before
the layer's turn, in forward and in backward passes. All else stays on the GPU: adapters, norms, biases, embedding and
head. See `stream_ring` for the order, `stream_files` for the disk.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fourfold.errors import CheckpointError, ConfigError, TrainingError
from fourfold.kernels.host_memory import HostBuffer, available_bytes, rounded_to_pages
from fourfold.models.block import FusedDecoderLayer
from fourfold.models.stream_files import NUM_HOST_BUFFERS, DiskCopies, MappedFiles
from fourfold.models.stream_ring import NUM_SLOTS, Copies, DeviceCopies, LayerRing, PlainCopies
from fourfold.quantization.experts import quantized_parameters
from fourfold.quantization.layout import from_state_dict
from fourfold.quantization.linear import QuantizedWeight
from fourfold.quantization.tensor import QuantizedTensor

__all__ = ["SOURCES", "WeightStream", "device_bytes", "host_bytes", "layer_bytes", "stream_base", "stream_of"]

logger = logging.getLogger(__name__)

SOURCES: dict[str, str] = {"host": "host memory", "disk": "the disk"}
# What the widest loads of the kernels ask for, and what a GPU's allocator gives.
_ALIGNMENT = 256


def layer_bytes(tensor_bytes: Iterable[int]) -> int:
    """Bytes of one layer's run, given those of each tensor in it: codes, scales, and of double-quantized scales the
    nested scales and the offset (4)."""
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in tensor_bytes)


def device_bytes(layers: Sequence[int]) -> int:
    """Bytes of the ring on the device, given `layer_bytes` of each layer."""
    return min(NUM_SLOTS, len(layers)) * max(layers)


def host_bytes(layers: Sequence[int], source: str = "host") -> int:
    """Bytes of page-locked host memory, given `layer_bytes` of each layer."""
    if source == "disk":
        return min(NUM_HOST_BUFFERS, len(layers)) * rounded_to_pages(max(layers))
    return sum(map(rounded_to_pages, layers))


@dataclass(frozen=True)
class StreamedWeight:
    """Where a module's weight is when it is computed with."""

    stream: WeightStream
    layer: int
    index: int

    @property
    def device(self) -> torch.device:
        return self.stream.device

    def read(self) -> QuantizedTensor:
        """The weight on the device, until another layer's is read."""
        return self.stream.read(self.layer, self.index)

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise ConfigError(
            "a model whose base streams cannot be copied", hint="copy it first, and let each copy's base stream"
        )

    def __reduce__(self) -> NoReturn:
        raise ConfigError("a model whose base streams cannot be pickled", hint="save it with save_pretrained")


class WeightStream:
    """The streaming base of one model.

    Attributes:
        device: Where layers are computed.
        source: One of `SOURCES`.
        layers: `layer_bytes` of each layer.
        host_bytes: Page-locked host memory in use.
        device_bytes: Memory of the ring.
    """

    def __init__(self, device: torch.device, source: str, weights: list[list[QuantizedTensor]]) -> None:
        self.device = device
        self.source = source
        self.layers = [layer_bytes(tensor.nbytes for tensor in _tensors(layer)) for layer in weights]
        self.host_bytes = host_bytes(self.layers, source)
        self.device_bytes = device_bytes(self.layers)
        # Shapes, tables and the like; what they hold on the host stays where it is.
        self._weights = weights
        self._buffers: list[HostBuffer] = []
        self._views: dict[tuple[int, int], list[QuantizedTensor]] = {}
        self._ring: LayerRing | None = None

    @property
    def ring(self) -> LayerRing:
        assert self._ring is not None
        return self._ring

    def start(self, copies: Copies, buffers: Sequence[HostBuffer] = ()) -> None:
        """Allocate the ring, which is filled by `copies`."""
        size, count = max(self.layers), min(NUM_SLOTS, len(self.layers))
        slots = [torch.empty(size, dtype=torch.uint8, device=self.device) for _ in range(count)]
        self._buffers = list(buffers)
        self._ring = LayerRing(len(self.layers), slots, copies)
        if self.device.type == "cuda":
            # The allocator may hand out what work that is queued here still reads.
            current = torch.cuda.current_stream(self.device)
            for slot in self._ring.slots:
                slot.left = [current.record_event()]

    def read(self, layer: int, index: int) -> QuantizedTensor:
        """Weight number `index` of a layer on the device, until another layer's is read."""
        slot = self.ring.enter(layer)
        views = self._views.get((layer, slot.index))
        if views is None:
            views = self._views[layer, slot.index] = _views(self._weights[layer], slot.buffer)
        return views[index]


def stream_base(
    model: nn.Module,
    device: torch.device | str | None = None,
    *,
    source: str = "host",
    folder: str | Path | None = None,
) -> WeightStream:
    """Let the quantized weights of a model's decoder layers stay in host memory, and pass through the GPU.

    Everything else is moved to `device`. So that no moment holds the model on the GPU, load it to the CPU:
    `load_model(..., device="cpu")`; of a quantized checkpoint nothing is read before it is needed. A layer is copied
    ahead of its turn, on a stream of its own, and in steady state the host waits for nothing. Numbers, parameter names
    and saved files are those of the same model without streaming: `state_dict` and sizes see the weights in host
    memory, merging makes ordinary layers on `device`. `model.to(device)` moves all but the streamed weights, which are
    computed with on `device` or in host memory. CUDA graphs are off.

    Args:
        model: A causal LM of Transformers, adapters on it or not, its decoder layers on the CPU or on the GPU.
        device: Where to compute; None: the current GPU, or the CPU, where the same is done with plain copies.
        source: "host": in page-locked host memory; "disk": in the files of the quantized checkpoint that the model was
            loaded from, read ahead, for a base larger than the host's memory.
        folder: The checkpoint, for "disk"; None: where Transformers says that the model came from.

    Raises:
        ConfigError: An unknown source; decoder layers that are not found, not quantized, with quantized experts, or
            streaming already.
        CheckpointError: "disk" without a quantized checkpoint, or with one that is not the model's.
        TrainingError: Too little host memory, or it cannot be locked.
    """
    if source not in SOURCES:
        raise ConfigError("unknown place for the base to stream from", found=source, allowed=SOURCES)
    place = _indexed(device)
    layers = _quantized_layers(model)
    # What CUDA does on the host's behalf, too, is done through that GPU.
    with torch.cuda.device(place) if place.type == "cuda" else contextlib.nullcontext():
        stream = _from_host(layers, place) if source == "host" else _from_disk(model, layers, place, folder)
    for number, layer in enumerate(layers):
        for index, (_, weight) in enumerate(layer):
            weight.stream_from(StreamedWeight(stream, number, index))
    for module in model.modules():
        if isinstance(module, FusedDecoderLayer):
            module._graphs = None  # the weights move
        if "hf_device_map" in vars(module):
            vars(module)["hf_device_map"] = {"": place}
    model.to(place)
    logger.info(
        "The base streams from %s: %d layers, %.2f GB, through %.2f GB on %s",
        *(SOURCES[source], len(layers), sum(stream.layers) / 1e9, stream.device_bytes / 1e9, place),
    )
    return stream


def stream_of(model: nn.Module) -> WeightStream | None:
    """The stream of a model's base, or None where it does not stream."""
    streamed = (getattr(module, "streamed", None) for module in model.modules())
    return next((each.stream for each in streamed if isinstance(each, StreamedWeight)), None)


def _indexed(device: torch.device | str | None) -> torch.device:
    """With its number, as tensors name it."""
    return torch.empty(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device


def _quantized_layers(model: nn.Module) -> list[list[tuple[str, QuantizedWeight]]]:
    """(name, module) of the quantized weights of each decoder layer; names as the base has them."""
    config: Any = getattr(model, "config", None)
    num_layers = config.get_text_config().num_hidden_layers if config is not None else 0
    found = [
        (path, stack)
        for path, stack in model.named_modules()
        if isinstance(stack, nn.ModuleList) and len(stack) == num_layers
    ]
    if not found:
        raise ConfigError("no decoder layers to stream were found", found=type(model).__name__)
    path, stack = found[0]
    layers = []
    for number, layer in enumerate(stack):
        if any(quantized_parameters(module) for module in layer.modules()):
            raise ConfigError(
                "quantized experts that are held as one parameter do not stream",
                found=f"{path}.{number}",
                allowed="models whose layers hold linear layers",
            )
        named = [
            (_base_name(f"{path}.{number}.{name}"), module)
            for name, module in layer.named_modules()
            if isinstance(module, QuantizedWeight)
        ]
        if not named:
            raise ConfigError(
                "only quantized layers stream",
                found=f"{path}.{number} has no quantized weight",
                hint="load the model in 4 bits, and leave whole layers out of modules_to_not_convert",
            )
        if any(module.streamed is not None for _, module in named):
            raise ConfigError("the base of this model streams already", hint="call stream_base once")
        layers.append(named)
    return layers


def _base_name(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def _from_host(layers: list[list[tuple[str, QuantizedWeight]]], device: torch.device) -> WeightStream:
    stream = WeightStream(device, "host", [[module.quantized for _, module in layer] for layer in layers])
    pinned = device.type == "cuda"
    buffers = []
    for number, layer in enumerate(layers):
        if pinned:
            _require_memory(stream.layers[number], stream)
        purpose = f"layer {number} of {len(layers)}, {stream.host_bytes / 2**30:,.1f} GiB in all"
        buffer = HostBuffer(stream.layers[number], pinned=pinned, purpose=purpose)
        weights = [module.quantized for _, module in layer]
        on_host = _views(weights, buffer.data)
        for source, target in zip(_tensors(weights), _tensors(on_host), strict=True):
            target.copy_(source)
        # The former memory is let go before the next layer's is taken.
        stream._weights[number] = on_host
        for (_, module), weight in zip(layer, on_host, strict=True):
            module.quantized = weight
        buffers.append(buffer)
    data = [buffer.data for buffer in buffers]
    stream.start(DeviceCopies(data, device) if pinned else PlainCopies(data), buffers)
    return stream


def _require_memory(num_bytes: int, stream: WeightStream) -> None:
    available = available_bytes()
    if available is not None and available < num_bytes:
        raise TrainingError(
            f"too little host memory for the base to stream from: {stream.host_bytes / 2**30:,.1f} GiB in all",
            found=f"{available / 2**30:,.1f} GiB left, {num_bytes / 2**30:,.2f} GiB wanted for the next layer",
            hint="stream from the disk (stream_base: disk), or free memory",
        )


def _from_disk(
    model: nn.Module, layers: list[list[tuple[str, QuantizedWeight]]], device: torch.device, folder: str | Path | None
) -> WeightStream:
    files = MappedFiles(_quantized_checkpoint(model, folder))
    weights = []
    for layer in layers:
        mapped = [_mapped(files, name, module) for name, module in layer]
        for (_, module), weight in zip(layer, mapped, strict=True):
            module.quantized = weight
        weights.append(mapped)
    stream = WeightStream(device, "disk", weights)
    pieces = [
        [files.piece(tensor, offset) for tensor, offset in zip(_tensors(layer), _offsets(layer), strict=True)]
        for layer in weights
    ]
    inner = DeviceCopies([], device) if device.type == "cuda" else None
    copies = DiskCopies(pieces, stream.layers, inner, files)
    stream.start(copies)
    return stream


def _quantized_checkpoint(model: nn.Module, folder: str | Path | None) -> Path:
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    quantizer = getattr(base, "hf_quantizer", None)
    name = str(folder or getattr(base, "name_or_path", "") or "MODEL")
    make = f"make one with `fourfold quantize {name} --out DIR`, and give DIR as model_name_or_path"
    if not getattr(quantizer, "pre_quantized", False):
        raise CheckpointError(
            "a base streams from the disk out of a quantized checkpoint, and this one was quantized as it was loaded",
            found=name,
            hint=make,
        )
    path = Path(name)
    if not path.is_dir():
        raise CheckpointError(
            "the base streams from the disk out of a folder", found=name, hint=f"give the folder it is in, or {make}"
        )
    return path


def _mapped(files: MappedFiles, name: str, module: QuantizedWeight) -> QuantizedTensor:
    """The module's weight in the mapped files. Raises CheckpointError where that is another one."""
    known = module.quantized
    weight = from_state_dict(files.tensors, f"{name}.weight", known.outlier_threshold or 0.0)
    # Whoever changes a weight changes its scales, which are one part in thirty of it.
    ours, theirs = ([one.cpu() for one in _tensors([each])[1:]] for each in (known, weight))
    are_equal = len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))
    if not are_equal or known.shape != weight.shape or known.format != weight.format:
        raise CheckpointError(
            f"{name} is not what {files.folder} holds",
            hint="an initialisation such as PiSSA changed the base: save it, and load it from there",
        )
    return weight


def _tensors(weights: Iterable[QuantizedTensor]) -> list[Tensor]:
    """All that the weights hold for themselves, codes first, in the order of their places in a layer's bytes."""
    tensors: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    for weight in weights:
        weight.map_tensors(collect)
    return tensors


def _offsets(weights: Iterable[QuantizedTensor]) -> list[int]:
    sizes = [layer_bytes([tensor.nbytes]) for tensor in _tensors(weights)]
    return [sum(sizes[:index]) for index in range(len(sizes))]


def _views(weights: Sequence[QuantizedTensor], buffer: Tensor) -> list[QuantizedTensor]:
    """The same weights in `buffer`, uint8, which need not hold them yet."""
    offsets = iter(_offsets(weights))

    def place(tensor: Tensor) -> Tensor:
        start = next(offsets)
        return buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)

    return [weight.map_tensors(place) for weight in weights]
