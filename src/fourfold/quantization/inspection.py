"""What quantizing does to a model's weights: each layer's error, and where they lie among the code points."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from fourfold.errors import CheckpointError
from fourfold.quantization.formats import get_format
from fourfold.quantization.hf_config import QUANT_METHOD, FourfoldConfig
from fourfold.quantization.hf_quantizer import FourfoldQuantizer
from fourfold.quantization.layout import entry_keys, from_state_dict, is_quantized
from fourfold.quantization.linear import QuantizedWeight
from fourfold.quantization.llm_int8 import DEFAULT_THRESHOLD
from fourfold.quantization.tensor import QuantizedTensor, quantize

__all__ = ["Histogram", "Inspection", "LayerInspection", "inspect_checkpoint", "inspect_weights"]

# Two bins a column of the text drawing.
NUM_BINS = 180
_BARS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class LayerInspection:
    """What quantizing does to one tensor, or to all of them together.

    Args:
        name: Name of the tensor in the model.
        shape: Its shape; empty for the total.
        format: Name of the number format.
        num_elements: Weights it has.
        num_bytes: Bytes they take: codes and scales.
        relative_error: ||W - Q|| / ||W||; None where the original is not known.
        snr_db: Signal-to-noise ratio, -20 log10 of the relative error, in dB; None as well where there is no error.
        max_abs_error: The largest |W - Q|.
    """

    name: str
    shape: tuple[int, ...]
    format: str
    num_elements: int
    num_bytes: int
    relative_error: float | None = None
    snr_db: float | None = None
    max_abs_error: float | None = None

    @property
    def bits_per_weight(self) -> float:
        return 8 * self.num_bytes / self.num_elements if self.num_elements else 0.0

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "bits_per_weight": self.bits_per_weight}


@dataclass(frozen=True)
class Histogram:
    """Where weights lie in units of their block's scale.

    Args:
        counts: Weights in each of equally wide bins over [-1, 1]; what lies beyond counts in the outermost.
        code_points: The values of the format, ascending.
    """

    counts: list[int]
    code_points: list[float]

    def lines(self, height: int = 10) -> list[str]:
        """The histogram in text, two bins a column, the code points marked below."""
        columns = [sum(self.counts[start : start + 2]) for start in range(0, len(self.counts), 2)]
        top = max(*columns, 1)
        total = sum(columns) or 1
        drawn = []
        for row in reversed(range(height)):
            eighths = [min(8, max(0, math.ceil(8 * (count / top * height - row)))) for count in columns]
            label = f"{top / total:6.1%} " if row == height - 1 else " " * 7
            drawn.append((label + "".join(_BARS[level] for level in eighths)).rstrip())
        axis = ["─"] * len(columns)
        for value in self.code_points:
            axis[min(int((value + 1) / 2 * len(columns)), len(columns) - 1)] = "┴"
        middle = len(columns) // 2
        scale = f"{'-1':<{middle}}0{'1':>{len(columns) - middle - 1}}"
        return [*drawn, " " * 7 + "".join(axis), " " * 7 + scale]


@dataclass(frozen=True)
class Inspection:
    """Every layer of a model, in its order, the total, and the histogram (None where the weights are not known)."""

    layers: list[LayerInspection]
    total: LayerInspection
    histogram: Histogram | None = None

    def to_dict(self) -> dict[str, Any]:
        return {
            "layers": [layer.to_dict() for layer in self.layers],
            "total": self.total.to_dict(),
            "histogram": None if self.histogram is None else asdict(self.histogram),
        }

    def lines(self) -> list[str]:
        """A table of at most 100 columns, and under it the histogram."""
        width = min(max(len(layer.name) for layer in (*self.layers, self.total)), 44)
        head = (
            f"{'tensor':<{width}} {'shape':>13} {'format':>6} {'error':>8} {'SNR dB':>7} {'max error':>9} {'bits':>6}"
        )
        rows = [_row(layer, width) for layer in self.layers]
        table = [head, "─" * len(head), *rows, "─" * len(head), _row(self.total, width)]
        if self.histogram is None:
            return [*table, "", "The weights are quantized already; their error cannot be known without the originals."]
        title = f"Weights in units of their block's scale, and under them the code points of {self.total.format}"
        return [*table, "", title, *self.histogram.lines()]

    def save_picture(self, path: str | Path) -> None:
        """Draw the histogram with the code points as vertical lines; the file's suffix gives its kind.

        Raises:
            CheckpointError: The checkpoint was quantized already, so that there is no histogram.
        """
        # Matplotlib takes half a second to import, and few who inspect want a picture.
        from matplotlib.figure import Figure

        if self.histogram is None:
            raise CheckpointError(
                "a checkpoint that is quantized already has no histogram of its weights",
                hint="inspect the 16-bit checkpoint it came from",
            )
        counts, points = self.histogram.counts, self.histogram.code_points
        total = sum(counts) or 1
        edges = [-1 + 2 * index / len(counts) for index in range(len(counts) + 1)]
        figure = Figure(figsize=(9, 4.5), layout="constrained")
        axes = figure.subplots()
        axes.stairs([100 * count / total for count in counts], edges, fill=True, color="#4c78a8", label="weights")
        axes.vlines(
            points,
            0,
            1,
            transform=axes.get_xaxis_transform(),
            colors="#e45756",
            linewidth=0.9 if len(points) <= 16 else 0.2,
            label=f"{len(points)} code points",
        )
        axes.set(xlim=(-1.03, 1.03), ylim=(0, None), xlabel="weight / scale of its block", ylabel="% of weights")
        axes.set_title(_summary(self.total), fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(loc="upper right", frameon=True, framealpha=1.0)
        figure.savefig(path, dpi=120)


def inspect_weights(
    named_tensors: Iterable[tuple[str, Tensor]],
    format: str = "nf4",
    block_size: int = 64,
    double_quant: bool = True,
    *,
    calibration: str = "absmax",
    outlier_threshold: float = DEFAULT_THRESHOLD,
) -> Inspection:
    """Quantize tensors one by one, and measure.

    Args:
        named_tensors: Names and tensors, fp32, fp16 or bf16; none is kept.
        format: As the rest, of `quantize`.
        block_size: See there.
        double_quant: See there.
        calibration: See there.
        outlier_threshold: See there; inputs are not looked at here.

    Raises:
        QuantizationError: As for `quantize`.
    """
    number_format = get_format(format)
    layers = []
    counts = torch.zeros(NUM_BINS, dtype=torch.int64)
    signal = noise = 0.0
    for name, tensor in named_tensors:
        quantized = quantize(tensor, number_format, block_size, double_quant, calibration=calibration, name=name)
        weight = tensor.detach().float()
        error = quantized.dequantize(torch.float32).sub_(weight)
        layer_signal, layer_noise = _squared_norm(weight), _squared_norm(error)
        largest = float(torch.linalg.vector_norm(error, math.inf)) if error.numel() else 0.0
        layers.append(_measured(_layer(name, quantized), layer_signal, layer_noise, largest))
        signal, noise = signal + layer_signal, noise + layer_noise
        counts += _count(weight, quantized).cpu()
    total = _measured(
        _total(layers, format), signal, noise, max((layer.max_abs_error or 0.0 for layer in layers), default=0.0)
    )
    return Inspection(layers, total, Histogram(counts.tolist(), number_format.sorted_values()[0].tolist()))


def inspect_checkpoint(folder: str | Path, config: FourfoldConfig | None = None) -> Inspection:
    """What `from_pretrained` with `config` would do to the weights of a checkpoint, read one by one.

    Of a checkpoint that is quantized already only format and size are given, and `config` is not used. Experts that the
    checkpoint holds one by one are measured one by one, although the model holds them in one tensor.

    Args:
        folder: A folder with config.json and safetensors.
        config: How to quantize.

    Raises:
        CheckpointError: Files that are missing or damaged, weights that are missing, or another quantization method.
        QuantizationError: Options that do not fit the model, or weights that are not finite.
    """
    folder = Path(folder)
    config = copy.deepcopy(config or FourfoldConfig())
    if not (folder / "config.json").is_file():
        raise CheckpointError(f"no checkpoint in {folder}: config.json is missing", allowed="a folder with a model")
    model_config = AutoConfig.from_pretrained(folder)
    with ExitStack() as stack:
        files = _open_all(folder, stack)
        entry = getattr(model_config, "quantization_config", None)
        if entry is not None:
            method = entry.get("quant_method") if isinstance(entry, dict) else entry.quant_method
            if method not in ("bitsandbytes", QUANT_METHOD):
                raise CheckpointError(
                    f"{folder} is quantized by another method",
                    found=f"quant_method={method!r}",
                    allowed=["bitsandbytes 4-bit", QUANT_METHOD, "a 16-bit checkpoint"],
                )
            return _inspect_quantized(folder, files)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(model_config)
        options = config.quantize_options()
        return inspect_weights(_selected(model, config, folder, files), **options)


def _open_all(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """The open safetensors file that holds each tensor; opening reads headers only."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"no weights in {folder}", allowed="safetensors files")
    files = {}
    for path in paths:
        try:
            file = stack.enter_context(safe_open(path, "pt"))
        except SafetensorError as error:
            raise CheckpointError(f"{path} cannot be read: {error}", hint="get the checkpoint again") from error
        files.update(dict.fromkeys(file.keys(), file))
    return files


def _selected(
    model: nn.Module, config: FourfoldConfig, folder: Path, files: dict[str, Any]
) -> Iterator[tuple[str, Tensor]]:
    """The weights that the quantizer would quantize, in the model's order, as the model would hold them."""
    prefix = f"{model.base_model_prefix}."
    quantizer = FourfoldQuantizer(config, pre_quantized=False)
    quantizer.preprocess_model(model)
    names = {name for name, _ in model.named_parameters()}
    missing, has_split_experts = [], False
    for name in (name for name, _ in model.named_parameters()):
        if not quantizer.param_needs_quantization(model, name) or name == f"{quantizer.tied_head}.weight":
            continue
        # A checkpoint of the headless model leaves out the prefix.
        key = name if name in files else name.removeprefix(prefix)
        module = model.get_submodule(name.rpartition(".")[0])
        if key in files:
            tensor: Tensor = files[key].get_tensor(key)
            yield name, tensor.T.contiguous() if getattr(module, "source_is_transposed", False) else tensor
        elif isinstance(module, QuantizedWeight):
            missing.append(name)
        else:
            has_split_experts = True
    experts = [key for key in files if ".experts." in key and key not in names] if has_split_experts else []
    for key in experts:
        yield key, files[key].get_tensor(key)
    if has_split_experts and not experts:
        missing.append("every expert")
    if missing:
        raise CheckpointError(
            f"{folder} lacks weights of its model",
            found=f"{len(missing)} missing: {', '.join(missing[:4])}",
            hint="the checkpoint was half written: get it again",
        )


def _inspect_quantized(folder: Path, files: dict[str, Any]) -> Inspection:
    layers = []
    for key in files:
        if is_quantized(files, key):
            keys = [key, *entry_keys(key)]
            entries = {name: files[name].get_tensor(name) for name in keys if name in files}
            layers.append(_layer(key, from_state_dict(entries, key)))
    if not layers:
        raise CheckpointError(
            f"{folder / 'config.json'} says that the model is quantized, but no tensor is quantized",
            hint="config.json and the weights do not belong together: get the checkpoint again",
        )
    return Inspection(layers, _total(layers, "/".join(sorted({layer.format for layer in layers}))))


def _layer(name: str, tensor: QuantizedTensor) -> LayerInspection:
    return LayerInspection(name, tuple(tensor.shape), tensor.format.name, tensor.num_elements, tensor.num_bytes)


def _total(layers: list[LayerInspection], format: str) -> LayerInspection:
    num_elements = sum(layer.num_elements for layer in layers)
    num_bytes = sum(layer.num_bytes for layer in layers)
    return LayerInspection(f"{len(layers)} tensors", (), format, num_elements, num_bytes)


def _measured(layer: LayerInspection, signal: float, noise: float, max_abs_error: float) -> LayerInspection:
    relative = math.sqrt(noise / signal) if signal else 0.0
    snr = -20 * math.log10(relative) if relative else None
    return replace(layer, relative_error=relative, snr_db=snr, max_abs_error=max_abs_error)


def _squared_norm(tensor: Tensor) -> float:
    # Norms of rows first: the sum over hundreds of millions of squares is not left to one fp32 accumulator.
    rows = tensor.reshape(tensor.shape[0], -1) if tensor.ndim else tensor.reshape(1, 1)
    return float(torch.linalg.vector_norm(rows, dim=1).double().square().sum())


def _count(weight: Tensor, quantized: QuantizedTensor) -> Tensor:
    """int64 [NUM_BINS]: the weights in units of their block's scale, counted."""
    flat = weight.reshape(-1)
    scales = quantized.scales.dequantize()
    missing = scales.numel() * quantized.block_size - flat.numel()
    blocks = (
        nn.functional.pad(flat, (0, missing)).view(scales.numel(), -1) if missing else flat.view(scales.numel(), -1)
    )
    # The scale of a block of zeros is zero.
    inverse = torch.where(scales > 0, 1 / scales, 0.0)[:, None]
    normalized = (blocks * inverse).clamp_(-1, 1).reshape(-1)[: flat.numel()]
    return torch.histc(normalized, NUM_BINS, -1, 1).long()


def _row(layer: LayerInspection, width: int) -> str:
    name = layer.name if len(layer.name) <= width else "…" + layer.name[1 - width :]
    shape = "×".join(map(str, layer.shape)) or f"{layer.num_elements / 1e6:.1f}M"
    error = "" if layer.relative_error is None else f"{layer.relative_error:.2%}"
    snr = "" if layer.snr_db is None else f"{layer.snr_db:.2f}"
    largest = "" if layer.max_abs_error is None else f"{layer.max_abs_error:.2e}"
    return (
        f"{name:<{width}} {shape:>13} {layer.format:>6} {error:>8} {snr:>7} {largest:>9} {layer.bits_per_weight:6.3f}"
    )


def _summary(total: LayerInspection) -> str:
    text = f"{total.num_elements / 1e6:,.1f}M weights in {total.format}, {total.bits_per_weight:.3f} bits each"
    if total.snr_db is not None:
        text += f": relative error {total.relative_error:.2%}, signal-to-noise {total.snr_db:.2f} dB"
    return text
