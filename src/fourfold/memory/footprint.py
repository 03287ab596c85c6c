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
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fourfold.kernels.cross_entropy import rows_at_once
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
# Where layers' tensors wait in host memory, those of so many layers are still, or again, on the GPU.
IN_FLIGHT_FORWARD, IN_FLIGHT_BACKWARD = 2, 1


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

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def runs_by_graphs(self) -> bool:
        if self.streams or any(POLICIES[policy].offload for policy in self.policies):
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
    element = shape.blocks[0].element_size
    streamed = sum(shape.layer_bytes) if step.streams else 0
    weights = {
        "weights, 16 bits": shape.num_dense * element,
        # What streams is aligned; what else is quantized, such as the head, stays.
        "weights, quantized": max(0, shape.code_bytes + shape.scale_bytes - streamed) if streamed else shape.code_bytes,
        "layers on their way": device_bytes(shape.layer_bytes) if streamed else 0,
        "quantization state": 0 if streamed else shape.scale_bytes,
        "adapters": shape.num_adapter * _FP32,
        "optimizer state": step.optimizer_bytes,
        "pages of optimizer state": step.staging_bytes,
        "libraries": LIBRARY_BYTES + (GRAPH_LIBRARY_BYTES if step.runs_by_graphs else 0),
    }
    pairs = zip(shape.blocks, step.policies, strict=True)
    blocks = [BlockMemory(block, step.tokens, policy) for block, policy in pairs]
    gradients = shape.num_adapter * _FP32
    moments = {
        "forward": _forward(blocks),
        "loss": _loss(shape, step, blocks),
        "backward": _backward(shape, step, blocks),
        "update": _Moment({"gradients": gradients}, {}),
    }
    if step.runs_by_graphs:
        graphs = {
            # Graphs write gradients where they always write them; the optimizer gets copies.
            "gradients in graphs": gradients,
            "shared by graphs": blocks[0].backward_moments()[0]["gradient of the output"] + blocks[0].kept()["x"],
        }
        # The last layer's backward pass is captured before there is a loss.
        kept, working = _on_gpu(blocks[:-1]), _heaviest(blocks[-1])
        loss = moments["loss"]
        moments["capture"] = _Moment({"activations kept": kept, **graphs}, working)
        moments["loss"] = _Moment({**loss.parts, **graphs}, loss.working)
        moments["update"] = _Moment({"activations kept": _on_gpu(blocks), "gradients": gradients, **graphs}, {})
    if step.eval_batch:
        moments["evaluation"] = _evaluation(shape, step, blocks)
    name = max(moments, key=lambda name: moments[name].num_bytes)
    highest, base = moments[name], sum(weights.values())
    parts = {**weights, **highest.parts, "working memory": sum(highest.working.values())}
    host = {
        "activations": sum(block.host_bytes() for block in blocks),
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


def _on_gpu(blocks: Sequence[BlockMemory]) -> int:
    """What layers that are not at work keep there."""
    return sum(sum(block.kept().values()) - sum(block.offloaded().values()) for block in blocks)


def _in_flight(blocks: Sequence[BlockMemory]) -> int:
    """What layers have there that waits, or will wait, in host memory."""
    return sum(sum(block.offloaded().values()) for block in blocks)


def _forward(blocks: Sequence[BlockMemory]) -> _Moment:
    # Transformers holds the embeddings till the last layer is done.
    behind = blocks[0].offloaded().get("x", 0)
    moments = []
    for index, block in enumerate(blocks):
        kept = behind + _in_flight(blocks[max(0, index - IN_FLIGHT_FORWARD) : index])
        moments += [_Moment({"activations kept": kept}, moment) for moment in block.forward_moments()]
        behind += _on_gpu([block])
    return max(moments, key=lambda moment: moment.num_bytes)


def _chunk_of_logits(shape: ModelShape, tokens: int) -> tuple[int, int]:
    """Rows of it, and bytes."""
    element = shape.blocks[0].element_size
    rows = min(rows_at_once(shape.vocab_size, shape.hidden_size, element), tokens)
    return rows, rows * (-(-shape.vocab_size // 64) * 64) * element


def _loss(shape: ModelShape, step: Step, blocks: Sequence[BlockMemory]) -> _Moment:
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
    kept = _on_gpu(blocks) + _in_flight(blocks[-IN_FLIGHT_FORWARD:])
    return _Moment({"activations kept": kept, "logits": logits}, working)


def _heaviest(block: BlockMemory) -> Tensors:
    """Of a layer's backward pass, without the gradients that it makes."""
    working = max(block.backward_moments(), key=lambda moment: sum(moment.values()))
    return {name: size for name, size in working.items() if name != "sums for adapters"}


def _backward(shape: ModelShape, step: Step, blocks: Sequence[BlockMemory]) -> _Moment:
    """From the last layer to the first, what is kept grows less and the gradients of adapters more."""
    heaviest = {block: _heaviest(block) for block in set(blocks)}
    kept = list(itertools.accumulate((_on_gpu([block]) for block in blocks), initial=0))
    gradients = 0
    moments = []
    for index in reversed(range(len(blocks))):
        block, before = blocks[index], blocks[max(0, index - IN_FLIGHT_BACKWARD) : index]
        gradients += block.shape.adapter_parameters * _FP32
        working = heaviest[block]
        if index == len(blocks) - 1:
            # Its memory has no room for low-rank columns; autograd holds it beside the copy that has.
            hidden = step.tokens * shape.hidden_size * block.shape.element_size
            working = {**working, "gradient of the last norm's input": hidden}
        parts = {"activations kept": kept[index] + _in_flight(before), "gradients": gradients}
        moments.append(_Moment(parts, working))
    return max(moments, key=lambda moment: moment.num_bytes)


def _evaluation(shape: ModelShape, step: Step, blocks: Sequence[BlockMemory]) -> _Moment:
    tokens = step.eval_batch * step.seq
    hidden = tokens * shape.hidden_size * shape.blocks[0].element_size
    moments = [moment for block in shape.blocks for moment in BlockMemory(block, tokens, "full").forward_moments()]
    moments.append({"last layer's output, and normed": 2 * hidden, "logits": _chunk_of_logits(shape, tokens)[1]})
    kept = _on_gpu(blocks) if step.runs_by_graphs else 0
    return _Moment({"activations kept": kept}, max(moments, key=lambda moment: sum(moment.values())))
