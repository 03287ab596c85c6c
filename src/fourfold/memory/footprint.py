"""What a training step takes on a GPU, part by part, before anything is loaded.

Each part's formula stands where the part lives: codes and scales in `quantization.footprint`, a block's tensors in
`models.block_memory` (those of layers on the generic path are followed, see `models.followed_layer`), optimizer state
in `optimizers.footprint`, logits in `memory.head`. Here they are added up over the moments of a step, and the highest
moment is the peak:

- forward: a layer at work, behind it what all layers before keep;
- loss: all that is kept, and a chunk of logits;
- backward: a layer at work, with what the layers before it keep, and the gradients of those behind it;
- embedding: where it is trained, its gradient beside all others;
- update: gradients of all that is trained, what the optimizer works in, and what CUDA graphs hold;
- capture: with CUDA graphs, the last layer's backward pass while it is recorded;
- evaluation: a layer at work, and a chunk of logits; what graphs keep is there, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from fourfold.memory.head import evaluation_chunk, loss_moments
from fourfold.models.block_memory import Tensors
from fourfold.models.following import GRADIENTS, INPUT
from fourfold.models.graphs import AUTO_TOKENS
from fourfold.models.model_shape import LayerMemory, ModelShape
from fourfold.models.recomputation import POLICIES
from fourfold.models.streaming import device_bytes, host_bytes

__all__ = ["Footprint", "Step", "footprint"]

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
        accumulation: Microbatches of an optimizer step: from the second on, gradients of all that is trained are there.
        update_bytes: What the optimizer works in, once it has all gradients.
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
    accumulation: int = 1
    update_bytes: int = 0

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
    """What a step takes.

    Args:
        shape: The model, its quantization, and what of it is trained.
        step: Batch, policies, optimizer.
    """
    streamed = sum(shape.layer_bytes) if step.streams else 0
    by_graphs = shape.is_fused and step.runs_by_graphs
    weights = {
        "weights, 16 bits" if shape.element_size == 2 else "weights, 32 bits": shape.dense_bytes,
        # What streams is aligned; what else is quantized, such as the head, stays.
        "weights, quantized": max(0, shape.code_bytes + shape.scale_bytes - streamed) if streamed else shape.code_bytes,
        "layers on their way": device_bytes(shape.layer_bytes) if streamed else 0,
        "quantization state": 0 if streamed else shape.scale_bytes,
        "adapters": shape.adapter_bytes,
        "optimizer state": step.optimizer_bytes,
        "pages of optimizer state": step.staging_bytes,
        "libraries": LIBRARY_BYTES + (GRAPH_LIBRARY_BYTES if by_graphs else 0),
    }
    pairs = zip(shape.blocks, step.policies, strict=True)
    blocks = [block.memory(step.batch, step.seq, policy) for block, policy in pairs]
    moments = {
        "forward": _forward(shape, step, blocks),
        "loss": _loss(shape, step, blocks),
        "backward": _backward(shape, step, blocks),
        "update": _Moment({GRADIENTS: shape.gradient_bytes}, {"workspace of the optimizer": step.update_bytes}),
    }
    if shape.embedding_gradient_bytes:
        moments["embedding"] = _embedding(shape, step)
    if by_graphs:
        graphs = {
            # Graphs write gradients where they always write them; the optimizer gets copies.
            "gradients in graphs": shape.gradient_bytes,
            "shared by graphs": blocks[0].backward_moments()[0]["gradient of the output"] + blocks[0].kept()[INPUT],
        }
        # The last layer's backward pass is captured before there is a loss.
        kept, working = _on_gpu(blocks[:-1]), _heaviest(blocks[-1])
        working.pop(GRADIENTS)
        loss, update = moments["loss"], moments["update"]
        moments["capture"] = _Moment(
            {"activations kept": kept, GRADIENTS: _gradients_before(shape, step), **graphs}, working
        )
        moments["loss"] = _Moment({**loss.parts, **graphs}, loss.working)
        moments["update"] = _Moment({"activations kept": _on_gpu(blocks), **update.parts, **graphs}, update.working)
    if step.eval_batch:
        moments["evaluation"] = _evaluation(shape, step, _on_gpu(blocks) if by_graphs else 0)
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
        detail={tensor: size for tensor, size in highest.working.items() if size},
    )


class _Moment(NamedTuple):
    """What is there beside the weights: parts by name, and what is worked on, tensor by tensor."""

    parts: Tensors
    working: Tensors

    @property
    def num_bytes(self) -> int:
        return sum(self.parts.values()) + sum(self.working.values())


def _highest(moments: Sequence[_Moment]) -> _Moment:
    return max(moments, key=lambda moment: moment.num_bytes)


def _on_gpu(blocks: Sequence[LayerMemory]) -> int:
    """What layers that are not at work keep there."""
    return sum(sum(block.kept().values()) - sum(block.offloaded().values()) for block in blocks)


def _in_flight(blocks: Sequence[LayerMemory]) -> int:
    """What layers have there that waits, or will wait, in host memory."""
    return sum(sum(block.offloaded().values()) for block in blocks)


def _hidden(shape: ModelShape, tokens: int) -> int:
    return tokens * shape.hidden_size * shape.element_size


def _around(shape: ModelShape, step: Step) -> int:
    """What all layers are called with, where it is not the blocks' own."""
    return 0 if shape.ends is None else shape.ends.around(step.batch, step.seq)


def _gradients_before(shape: ModelShape, step: Step) -> int:
    """Gradients that are there when a backward pass begins: of the microbatches before."""
    return shape.gradient_bytes if step.accumulation > 1 else 0


def _forward(shape: ModelShape, step: Step, blocks: Sequence[LayerMemory]) -> _Moment:
    # Transformers holds the embeddings till the last layer is done.
    kept_input = blocks[0].kept().get(INPUT, 0)
    behind = blocks[0].offloaded().get(INPUT, 0) if kept_input else _hidden(shape, step.tokens)
    behind += _around(shape, step)
    gradients = _gradients_before(shape, step)
    moments = []
    for index, block in enumerate(blocks):
        kept = behind + _in_flight(blocks[max(0, index - IN_FLIGHT_FORWARD) : index])
        parts = {"activations kept": kept, GRADIENTS: gradients}
        moments += [_Moment(parts, moment) for moment in block.forward_moments()]
        behind += _on_gpu([block])
    return _highest(moments)


def _loss(shape: ModelShape, step: Step, blocks: Sequence[LayerMemory]) -> _Moment:
    hidden = _hidden(shape, step.tokens)
    kept = _on_gpu(blocks) + _in_flight(blocks[-IN_FLIGHT_FORWARD:]) + _around(shape, step)
    tail: Tensors = {"last layer's output": hidden}
    gradients = _gradients_before(shape, step)
    moments = []
    if shape.ends is not None:
        norm = shape.ends.tail(step.batch, step.seq)
        tail = norm.forward.after
        # The norm's own passes, before and behind the head.
        parts = {"activations kept": kept, GRADIENTS: gradients}
        moments.append(_Moment(parts, norm.forward.peak))
        late = {**parts, GRADIENTS: max(gradients, shape.head_gradient_bytes)}
        moments.append(_Moment(late, norm.backward.peak))
    for logits, working in loss_moments(shape, step.tokens):
        parts = {"activations kept": kept, "logits": logits, GRADIENTS: gradients}
        moments.append(_Moment(parts, {**tail, **working}))
    return _highest(moments)


def _heaviest(block: LayerMemory) -> Tensors:
    """Of a layer's backward pass."""
    heaviest: Tensors = max(block.backward_moments(), key=lambda moment: sum(moment.values()))
    return dict(heaviest)


def _backward(shape: ModelShape, step: Step, blocks: Sequence[LayerMemory]) -> _Moment:
    """From the last layer to the first, what is kept grows less and the gradients more."""
    heaviest = {block: _heaviest(block) for block in set(blocks)}
    kept = list(itertools.accumulate((_on_gpu([block]) for block in blocks), initial=_around(shape, step)))
    behind = _gradients_before(shape, step) or shape.head_gradient_bytes
    moments = []
    for index in reversed(range(len(blocks))):
        before, working = blocks[max(0, index - IN_FLIGHT_BACKWARD) : index], dict(heaviest[blocks[index]])
        if index == len(blocks) - 1 and shape.is_fused:
            # Its memory has no room for low-rank columns; autograd holds it beside the copy that has.
            working["gradient of the last norm's input"] = _hidden(shape, step.tokens)
        gradients = behind + working.pop(GRADIENTS, 0)
        moments.append(_Moment({"activations kept": kept[index] + _in_flight(before), GRADIENTS: gradients}, working))
        if step.accumulation == 1:
            behind += shape.blocks[index].gradient_bytes
    return _highest(moments)


def _embedding(shape: ModelShape, step: Step) -> _Moment:
    """The end of the backward pass: the gradient of the embedding is made, and added to what there is of it."""
    is_there = shape.is_tied or step.accumulation > 1
    again = shape.embedding_gradient_bytes if is_there else 0
    working = {"gradient of the embedding": again, "gradient of its output": _hidden(shape, step.tokens)}
    return _Moment({"activations kept": _around(shape, step), GRADIENTS: shape.gradient_bytes}, working)


def _evaluation(shape: ModelShape, step: Step, kept: int) -> _Moment:
    batch, seq = step.eval_batch, step.seq
    hidden = _hidden(shape, batch * seq)
    memories = [block.memory(batch, seq, "full") for block in dict.fromkeys(shape.blocks)]
    moments = [moment for memory in memories for moment in memory.forward_moments()]
    moments.append({"last layer's output, and normed": 2 * hidden, "logits": evaluation_chunk(shape, batch * seq)})
    return _Moment({"activations kept": kept}, max(moments, key=lambda moment: sum(moment.values())))
