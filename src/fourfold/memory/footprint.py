"""What a training step takes on a GPU, part by part, before anything is loaded.

Each part's formula stands where the part lives: codes and scales in `quantization.footprint`, a block's tensors in
`models.block_memory`, optimizer state in `optimizers.footprint`, a chunk of logits in `kernels.cross_entropy`. Here
they are added up over the moments of a step, and the highest moment is the peak:

- forward: a layer at work, behind it what all layers before keep;
- loss: all that is kept, and a chunk of logits;
- backward: a layer at work, with what the layers before it keep, and the gradients of those behind it;
- update: gradients of all adapters, and what CUDA graphs hold;
- capture: with CUDA graphs, the last layer's backward pass while it is recorded;
- evaluation: a layer at work, and a chunk of logits; what graphs keep is there, too.

Of several GPUs (`memory.parallel`), it is what one of them takes.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import NamedTuple

from fourfold.kernels.cross_entropy import rows_at_once
from fourfold.memory.parallel import ONE_GPU, Parallelism
from fourfold.models.block_memory import BlockMemory, Tensors
from fourfold.models.graphs import AUTO_TOKENS
from fourfold.models.model_shape import ModelShape
from fourfold.models.recomputation import POLICIES
from fourfold.models.streaming import device_bytes, host_bytes

__all__ = ["Footprint", "Step", "footprint"]

_FP32 = 4
# What cuBLAS works in: 32 MiB on Hopper, for each of two of its interfaces (torch's `getChosenWorkspaceSize`); and once
# more on the stream on which graphs are captured.
LIBRARY_BYTES = 2 * 2**25
GRAPH_LIBRARY_BYTES = 2**25
# Of the layers whose tensors wait in host memory, those of so many are still, or again, on the GPU: the last ones of
# the forward pass, which none after them pushed out, and the one before a layer that had its own brought back.
IN_FLIGHT_FORWARD, IN_FLIGHT_BACKWARD = 2, 1
# Layers whose weights are gathered from other GPUs at a time: one at work, one on its way.
NUM_GATHERED = 2


@dataclass(frozen=True)
class Step:
    """What a training step works on.

    Args:
        batch: Rows of a microbatch.
        seq: Tokens of a row.
        policies: Recomputation policy of each layer.
        optimizer_bytes: Optimizer state on the GPU.
        staging_bytes: What a paged optimizer works in on the GPU.
        host_optimizer_bytes: Optimizer state in host memory.
        cuda_graphs: Whether blocks run by CUDA graphs; None: where they do by default.
        streams: Where the quantized layers stream from, of `models.streaming.SOURCES`; None: they stay on the GPU.
        eval_batch: Rows of a batch of evaluation, as long as those of training; 0: there is none.
        parallelism: How GPUs share the run; batch and bytes are those of one.
    """

    batch: int
    seq: int
    policies: Sequence[str]
    optimizer_bytes: int = 0
    staging_bytes: int = 0
    host_optimizer_bytes: int = 0
    cuda_graphs: bool | None = None
    streams: str | None = None
    eval_batch: int = 0
    parallelism: Parallelism = ONE_GPU

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def runs_by_graphs(self) -> bool:
        # A graph reads weights where they were captured.
        if self.streams or self.parallelism.shards.weights or any(POLICIES[policy].offload for policy in self.policies):
            return False
        return self.tokens <= AUTO_TOKENS if self.cuda_graphs is None else self.cuda_graphs


@dataclass(frozen=True)
class Footprint:
    """Bytes of a training step.

    Args:
        parts: On the GPU at the peak, by name; they add up to it.
        moment: When the peak is.
        moments: The height of each moment.
        host: Bytes in host memory, by name.
        detail: Of the part "working memory", every tensor.
    """

    parts: dict[str, int]
    moment: str
    moments: dict[str, int]
    host: dict[str, int] = field(default_factory=dict)
    detail: Tensors = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        return sum(self.parts.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.host.values())


def footprint(shape: ModelShape, step: Step) -> Footprint:
    """What a step of LoRA over fused blocks takes.

    Args:
        shape: The model, its quantization and its adapter.
        step: Batch, policies, optimizer.
    """
    pairs = zip(shape.blocks, step.policies, strict=True)
    blocks = [BlockMemory(block, step.tokens, policy) for block, policy in pairs]
    layers = [_layer(block) for block in blocks]
    gradients = step.parallelism.share(shape.num_adapter * _FP32, step.parallelism.shards.gradients)
    standing = _standing(shape, step)
    moments = {
        "forward": _forward(layers),
        "loss": _loss(shape, step, layers),
        "backward": _backward(shape, step, layers),
        "update": _Moment({"gradients": gradients}, {}),
    }
    if step.runs_by_graphs:
        graphs = {
            # Graphs write gradients where they always write them; the optimizer gets copies.
            "gradients in graphs": gradients,
            "shared by graphs": blocks[0].backward_moments()[0]["gradient of the output"] + blocks[0].kept()["x"],
        }
        # The last layer's backward pass is captured before there is a loss.
        kept, working = _on_gpu(layers[:-1]), layers[-1].backward
        loss = moments["loss"]
        moments["capture"] = _Moment({"activations kept": kept, **graphs}, working)
        moments["loss"] = _Moment({**loss.parts, **graphs}, loss.working)
        moments["update"] = _Moment({"activations kept": _on_gpu(layers), "gradients": gradients, **graphs}, {})
    if step.eval_batch:
        moments["evaluation"] = _evaluation(shape, step, layers)
    name = max(moments, key=lambda name: moments[name].num_bytes)
    highest, base = moments[name], sum(standing.values())
    parts = {**standing, **highest.parts, "working memory": sum(highest.working.values())}
    host = {
        "activations": sum(layer.host for layer in layers),
        "optimizer state": step.host_optimizer_bytes,
        "weights": host_bytes(shape.layer_bytes, step.streams) if step.streams else 0,
    }
    return Footprint(
        parts={part: size for part, size in parts.items() if size},
        moment=name,
        moments={other: base + moment.num_bytes for other, moment in moments.items()},
        host={part: size for part, size in host.items() if size},
        detail=highest.working,
    )


class _Moment(NamedTuple):
    """What is there beside the weights: parts by name, and what is worked on, tensor by tensor."""

    parts: Tensors
    working: Tensors

    @property
    def num_bytes(self) -> int:
        return sum(self.parts.values()) + sum(self.working.values())


def _standing(shape: ModelShape, step: Step) -> Tensors:
    """What is there from the first step to the last."""
    element, parallelism = shape.blocks[0].element_size, step.parallelism
    layers, adapters = shape.weights_of_layers, shape.num_adapter * _FP32
    quantized = shape.code_bytes + shape.scale_bytes
    elsewhere = on_their_way = 0
    if step.streams:
        elsewhere, on_their_way = sum(layers), device_bytes(layers)
    elif parallelism.shards.weights:
        elsewhere = sum(layers) - parallelism.share(sum(layers), True)
        whole = (layer + block.adapter_parameters * _FP32 for layer, block in zip(layers, shape.blocks, strict=True))
        on_their_way = NUM_GATHERED * max(whole)
    is_apart = elsewhere and quantized
    return {
        "weights, 16 bits": shape.num_dense * element - (0 if quantized else elsewhere),
        # What streams is aligned; what else is quantized, such as the head, stays.
        "weights, quantized": max(0, quantized - elsewhere) if is_apart else shape.code_bytes,
        "layers on their way": on_their_way,
        "quantization state": 0 if is_apart else shape.scale_bytes,
        "adapters": parallelism.share(adapters, parallelism.shards.weights),
        "buckets of gradients": parallelism.bucket_bytes(adapters),
        "optimizer state": step.optimizer_bytes,
        "pages of optimizer state": step.staging_bytes,
        "libraries": LIBRARY_BYTES + (GRAPH_LIBRARY_BYTES if step.runs_by_graphs else 0),
    }


class _Layer(NamedTuple):
    """Of one layer: what it keeps on the GPU and in host memory, and its heaviest moments.

    Args:
        kept: Bytes that stay on the GPU while it is not at work.
        offloaded: Bytes that wait in host memory, and are on the GPU before and after that.
        embeddings: Of these, the layer's input.
        host: Bytes there.
        forward, backward: Tensors; the backward pass without the gradients that it makes.
        gradients: Bytes of these.
    """

    kept: int
    offloaded: int
    embeddings: int
    host: int
    forward: Tensors
    backward: Tensors
    gradients: int


@lru_cache(maxsize=4096)
def _layer(block: BlockMemory) -> _Layer:
    offloaded = block.offloaded()
    backward = _heaviest(block.backward_moments())
    return _Layer(
        kept=sum(block.kept().values()) - sum(offloaded.values()),
        offloaded=sum(offloaded.values()),
        embeddings=offloaded.get("x", 0),
        host=block.host_bytes(),
        forward=_heaviest(block.forward_moments()),
        backward={name: size for name, size in backward.items() if name != "sums for adapters"},
        gradients=block.shape.adapter_parameters * _FP32,
    )


def _heaviest(moments: Sequence[Tensors]) -> Tensors:
    return max(moments, key=lambda moment: sum(moment.values()))


def _on_gpu(layers: Sequence[_Layer]) -> int:
    """What layers that are not at work keep there."""
    return sum(layer.kept for layer in layers)


def _in_flight(layers: Sequence[_Layer]) -> int:
    """What the last layers that offload have there after the last layer's forward pass."""
    return sum([layer.offloaded for layer in layers if layer.offloaded][-IN_FLIGHT_FORWARD:])


def _forward(layers: Sequence[_Layer]) -> _Moment:
    behind = 0
    leaving: deque[int] = deque(maxlen=IN_FLIGHT_FORWARD)
    moments = []
    for index, layer in enumerate(layers):
        # Transformers holds the embeddings till the last layer is done.
        embeddings = 0 if index == 0 or 0 in leaving else layers[0].embeddings
        kept = behind + embeddings + sum(layers[number].offloaded for number in leaving)
        moments.append(_Moment({"activations kept": kept}, layer.forward))
        behind += layer.kept
        if layer.offloaded:
            leaving.append(index)
    return max(moments, key=lambda moment: moment.num_bytes)


def _chunk_of_logits(shape: ModelShape, tokens: int) -> tuple[int, int]:
    """Rows of it, and bytes."""
    element = shape.blocks[0].element_size
    rows = min(rows_at_once(shape.vocab_size, shape.hidden_size, element), tokens)
    return rows, rows * (-(-shape.vocab_size // 64) * 64) * element


def _loss(shape: ModelShape, step: Step, layers: Sequence[_Layer]) -> _Moment:
    element = shape.blocks[0].element_size
    hidden = step.tokens * shape.hidden_size * element
    rows, logits = _chunk_of_logits(shape, step.tokens)
    working: Tensors = {
        "last layer's output": hidden,
        "normed output": hidden,
        "gradient of it": hidden,
        "a chunk of it, and its gradient": 2 * rows * shape.hidden_size * element,
    }
    if shape.head_is_quantized:
        working["head, dequantized"] = shape.vocab_size * shape.hidden_size * element
    kept = _on_gpu(layers) + _in_flight(layers)
    return _Moment({"activations kept": kept, "logits": logits}, working)


def _backward(shape: ModelShape, step: Step, layers: Sequence[_Layer]) -> _Moment:
    """From the last layer to the first, what is kept grows less and the gradients of adapters more."""
    kept = list(itertools.accumulate((layer.kept for layer in layers), initial=0))
    # Tensors that wait in host memory, of each layer before this one that has such.
    waiting = [layer.offloaded for layer in layers if layer.offloaded]
    last = max((index for index, layer in enumerate(layers) if layer.offloaded), default=-1)
    shards = step.parallelism.shards
    gradients = 0
    moments = []
    for index in reversed(range(len(layers))):
        layer = layers[index]
        if layer.offloaded:
            waiting.pop()
        count = IN_FLIGHT_FORWARD if index > last else IN_FLIGHT_BACKWARD
        parts = {
            "activations kept": kept[index] + sum(waiting[-count:]),
            "gradients": gradients + layer.gradients,
        }
        gradients += step.parallelism.share(layer.gradients, shards.gradients)
        working = layer.backward
        if index == len(layers) - 1:
            # Its memory has no room for low-rank columns; autograd holds it beside the copy that has.
            hidden = step.tokens * shape.hidden_size * shape.blocks[index].element_size
            working = {**working, "gradient of the last norm's input": hidden}
        moments.append(_Moment(parts, working))
    return max(moments, key=lambda moment: moment.num_bytes)


def _evaluation(shape: ModelShape, step: Step, layers: Sequence[_Layer]) -> _Moment:
    tokens = step.eval_batch * step.seq
    hidden = tokens * shape.hidden_size * shape.blocks[0].element_size
    moments = [_layer(BlockMemory(block, tokens, "full")).forward for block in shape.blocks]
    moments.append({"last layer's output, and normed": 2 * hidden, "logits": _chunk_of_logits(shape, tokens)[1]})
    kept = _on_gpu(layers) if step.runs_by_graphs else 0
    return _Moment({"activations kept": kept}, _heaviest(moments))
