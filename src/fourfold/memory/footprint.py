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

Of several GPUs (`memory.parallel`), it is what one of them takes.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from fourfold.memory.head import evaluation_chunk, loss_moments
from fourfold.memory.parallel import ONE_GPU, Parallelism
from fourfold.memory.parts import Footprint
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
# Of the layers whose tensors wait in host memory, those of so many are still, or again, on the GPU: the last ones of
# the forward pass, which none after them pushed out, and the one before a layer that had its own brought back.
IN_FLIGHT_FORWARD, IN_FLIGHT_BACKWARD = 2, 1
_FP32 = 4


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
        parallelism: How GPUs share the run; batch and bytes are those of one.
        waiting: Microbatches whose activations wait on a pipeline's stage beside the one at work.
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
    parallelism: Parallelism = ONE_GPU
    waiting: int = 0

    @property
    def tokens(self) -> int:
        return self.batch * self.seq

    @property
    def runs_by_graphs(self) -> bool:
        """Where layers are fused blocks; others never do."""
        # A graph reads weights where they were captured.
        if self.streams or not self.parallelism.shards.runs_by_graphs:
            return False
        if any(POLICIES[policy].offload for policy in self.policies):
            return False
        return self.tokens <= AUTO_TOKENS if self.cuda_graphs is None else self.cuda_graphs


def footprint(shape: ModelShape, step: Step) -> Footprint:
    """What a step takes.

    Args:
        shape: The model, its quantization, and what of it is trained.
        step: Batch, policies, optimizer.
    """
    standing = _standing(shape, step)
    bare = replace(step, policies=tuple(step.policies), optimizer_bytes=0, host_optimizer_bytes=0, update_bytes=0)
    moments, activations = _moments(shape, replace(bare, staging_bytes=0))
    update = moments["update"]
    working = {**update.working, "workspace of the optimizer": step.update_bytes}
    moments = {**moments, "update": _Moment(update.parts, working)}
    name = max(moments, key=lambda name: moments[name].num_bytes)
    highest, base = moments[name], sum(standing.values())
    parts = {**standing, **highest.parts, "working memory": sum(highest.working.values())}
    host = {"activations": activations, **_in_host_memory(shape, step)}
    return Footprint(
        parts={part: size for part, size in parts.items() if size},
        moment=name,
        moments={other: base + moment.num_bytes for other, moment in moments.items()},
        host={part: size for part, size in host.items() if size},
        detail={tensor: size for tensor, size in highest.working.items() if size},
    )


@lru_cache(maxsize=1024)
def _moments(shape: ModelShape, step: Step) -> tuple[dict[str, _Moment], int]:
    """What is the same with every optimizer: each moment, and bytes of activations in host memory."""
    by_graphs = shape.is_fused and step.runs_by_graphs
    pairs = zip(shape.blocks, step.policies, strict=True)
    blocks = [block.memory(step.batch, step.seq, policy) for block, policy in pairs]
    layers = [_layer(block) for block in blocks]
    gradients = _gradients(shape, step)
    copies = step.parallelism.copy_bytes(shape.num_adapter)
    moments = {
        "forward": _forward(shape, step, layers),
        "backward": _backward(shape, step, layers),
        # DeepSpeed lays a share's gradients side by side in fp32, on the host where its copies are there.
        "update": _Moment(
            {GRADIENTS: gradients}, {"gradients in fp32": 0 if step.parallelism.offloads_optimizer else copies}
        ),
    }
    if shape.has_head:
        moments["loss"] = _loss(shape, step, layers)
    if shape.embedding_gradient_bytes:
        moments["embedding"] = _embedding(shape, step)
    if by_graphs:
        graphs = {
            # Graphs write gradients where they always write them; the optimizer gets copies.
            "gradients in graphs": gradients,
            "shared by graphs": blocks[0].backward_moments()[0]["gradient of the output"] + blocks[0].kept()[INPUT],
        }
        # The last layer's backward pass is captured before there is a loss.
        before = {"activations kept": _on_gpu(layers[:-1]), GRADIENTS: _gradients_before(shape, step)}
        loss, update = moments["loss"], moments["update"]
        moments["capture"] = _Moment({**before, **graphs}, layers[-1].backward)
        moments["loss"] = _Moment({**loss.parts, **graphs}, loss.working)
        moments["update"] = _Moment({"activations kept": _on_gpu(layers), **update.parts, **graphs}, update.working)
    if step.waiting:
        waiting = step.waiting * (_on_gpu(layers) + _around(shape, step))
        for name in moments.keys() - {"update"}:
            moments[name] = _Moment(
                {**moments[name].parts, "activations in the pipeline": waiting}, moments[name].working
            )
    if step.eval_batch:
        moments["evaluation"] = _evaluation(shape, step, _on_gpu(layers) if by_graphs else 0)
    return moments, sum(layer.host for layer in layers) * (1 + step.waiting)


class _Moment(NamedTuple):
    """What is there beside the weights: parts by name, and what is worked on, tensor by tensor."""

    parts: Tensors
    working: Tensors

    @property
    def num_bytes(self) -> int:
        return sum(self.parts.values()) + sum(self.working.values())


def _highest(moments: Sequence[_Moment]) -> _Moment:
    return max(moments, key=lambda moment: moment.num_bytes)


def _standing(shape: ModelShape, step: Step) -> Tensors:
    """What is there from the first step to the last."""
    parallelism, layers = step.parallelism, shape.weights_of_layers
    dense, codes, scales, adapters = shape.dense_bytes, shape.code_bytes, shape.scale_bytes, shape.adapter_bytes
    on_their_way = 0
    if step.streams:
        # What streams is aligned, codes and scales in one; what else is quantized, such as the head, stays.
        on_their_way, codes, scales = device_bytes(layers), max(0, codes + scales - sum(layers)), 0
    elif parallelism.shards.weights:
        # Norms, of which there is little, stay whole.
        layers = tuple(map(sum, zip(shape.shardable_bytes, shape.adapters_of_layers, strict=True)))
        on_their_way = parallelism.live_bytes(layers, 1 if codes else shape.element_size)
        sharded = sum(shape.dense_ends) + (0 if codes else sum(shape.shardable_bytes))
        dense += parallelism.weights_held(sharded) - sharded
        codes, scales = parallelism.weights_held(codes), parallelism.weights_held(scales)
        adapters = parallelism.weights_held(adapters)
    largest = max(block.gradient_bytes for block in shape.blocks)
    return {
        "weights, 16 bits" if shape.element_size == 2 else "weights, 32 bits": dense,
        "weights, quantized": codes,
        "layers on their way": on_their_way,
        "quantization state": scales,
        "adapters": adapters,
        "buckets of gradients": parallelism.bucket_bytes(
            shape.gradient_bytes, largest, shape.hidden_size, shape.trained_element
        ),
        # The activation that comes from the stage before, and its gradient from the one behind.
        "between stages": 2 * _hidden(shape, step.tokens) if parallelism.num_stages > 1 else 0,
        "fp32 copies": 0 if parallelism.offloads_optimizer else parallelism.copy_bytes(shape.num_adapter),
        "optimizer state": step.optimizer_bytes,
        "pages of optimizer state": step.staging_bytes,
        "libraries": LIBRARY_BYTES + (GRAPH_LIBRARY_BYTES if shape.is_fused and step.runs_by_graphs else 0),
    }


def _in_host_memory(shape: ModelShape, step: Step) -> Tensors:
    """What is there beside activations, of one process."""
    parallelism = step.parallelism
    weights = host_bytes(shape.layer_bytes, step.streams) if step.streams else 0
    if parallelism.offloads_weights:
        weights += parallelism.share(shape.code_bytes + shape.scale_bytes + shape.dense_bytes + shape.adapter_bytes)
    # The fp32 gradients of a share, beside what they update.
    copies = parallelism.copy_bytes(shape.num_adapter) if parallelism.offloads_optimizer else 0
    return {
        "optimizer state": step.host_optimizer_bytes,
        "fp32 copies": copies,
        "gradients": copies,
        "weights": weights,
    }


def _gradients(shape: ModelShape, step: Step) -> int:
    """Of all that is trained, or one GPU's share of them."""
    return step.parallelism.gradients_held(shape.gradient_bytes)


def _gradients_before(shape: ModelShape, step: Step) -> int:
    """Gradients that are there when a backward pass begins: of the microbatches before."""
    return _gradients(shape, step) if step.accumulation > 1 else 0


class _Layer(NamedTuple):
    """Of one layer: what it keeps on the GPU and in host memory, and its heaviest moments.

    Args:
        kept: Bytes that stay on the GPU while it is not at work.
        offloaded: Bytes that wait in host memory, and are on the GPU before and after that.
        embeddings: Of these, the layer's input; None where that is not kept at all.
        host: Bytes there.
        forward, backward: Tensors; the backward pass without the gradients that it makes.
        gradients: Bytes of these that are there by then.
    """

    kept: int
    offloaded: int
    embeddings: int | None
    host: int
    forward: Tensors
    backward: Tensors
    gradients: int


@lru_cache(maxsize=4096)
def _layer(block: LayerMemory) -> _Layer:
    kept, offloaded = block.kept(), block.offloaded()
    backward = _heaviest(block.backward_moments())
    return _Layer(
        kept=sum(kept.values()) - sum(offloaded.values()),
        offloaded=sum(offloaded.values()),
        embeddings=offloaded.get(INPUT, 0) if INPUT in kept else None,
        host=block.host_bytes(),
        forward=_heaviest(block.forward_moments()),
        backward={name: size for name, size in backward.items() if name != GRADIENTS},
        gradients=backward.get(GRADIENTS, 0),
    )


def _heaviest(moments: Sequence[Tensors]) -> Tensors:
    return max(moments, key=lambda moment: sum(moment.values()))


def _on_gpu(layers: Sequence[_Layer]) -> int:
    """What layers that are not at work keep there."""
    return sum(layer.kept for layer in layers)


def _in_flight(layers: Sequence[_Layer]) -> int:
    """What the last layers that offload have there after the last layer's forward pass."""
    return sum([layer.offloaded for layer in layers if layer.offloaded][-IN_FLIGHT_FORWARD:])


def _hidden(shape: ModelShape, tokens: int) -> int:
    return tokens * shape.hidden_size * shape.element_size


def _around(shape: ModelShape, step: Step) -> int:
    """What all layers are called with, where it is not the blocks' own."""
    return 0 if shape.ends is None else shape.ends.around(step.batch, step.seq)


def _forward(shape: ModelShape, step: Step, layers: Sequence[_Layer]) -> _Moment:
    # Transformers holds the embeddings till the last layer is done.
    first = layers[0].embeddings
    gradients, behind = _gradients_before(shape, step), _around(shape, step)
    leaving: deque[int] = deque(maxlen=IN_FLIGHT_FORWARD)
    moments = []
    for index, layer in enumerate(layers):
        embeddings = _hidden(shape, step.tokens) if first is None else first
        if first is not None and (index == 0 or 0 in leaving):
            embeddings = 0
        kept = behind + embeddings + sum(layers[number].offloaded for number in leaving)
        moments.append(_Moment({"activations kept": kept, GRADIENTS: gradients}, layer.forward))
        behind += layer.kept
        if layer.offloaded:
            leaving.append(index)
    return _highest(moments)


def _loss(shape: ModelShape, step: Step, layers: Sequence[_Layer]) -> _Moment:
    kept = _on_gpu(layers) + _in_flight(layers) + _around(shape, step)
    tail: Tensors = {"last layer's output": _hidden(shape, step.tokens)}
    head, shards = _head_gathered(shape, step), step.parallelism.shards
    gathered = {"head, gathered": head}
    gradients = _gradients_before(shape, step)
    moments = []
    if head and not (shape.is_tied or shape.head_gradient_bytes or shards.has_copies):
        # A frozen head comes when all layers are done, and FSDP2 copies it then.
        before = {"head, as it comes": head, "hidden states, and normed": 2 * _hidden(shape, step.tokens)}
        moments.append(_Moment({"activations kept": kept, GRADIENTS: gradients}, {**gathered, **before}))
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
        moments.append(_Moment(parts, {**tail, **gathered, **working}))
    return _highest(moments)


def _head_gathered(shape: ModelShape, step: Step) -> int:
    """Of a sharded head all, while it is at work."""
    return (sum(shape.dense_ends) if shape.is_tied else shape.dense_ends[1]) if step.parallelism.shards.weights else 0


def _backward(shape: ModelShape, step: Step, layers: Sequence[_Layer]) -> _Moment:
    """From the last layer to the first, what is kept grows less and the gradients more."""
    kept = list(itertools.accumulate((layer.kept for layer in layers), initial=_around(shape, step)))
    # Tensors that wait in host memory, of each layer before this one that has such.
    waiting = [layer.offloaded for layer in layers if layer.offloaded]
    last = max((index for index, layer in enumerate(layers) if layer.offloaded), default=-1)
    # The whole gradient of a sharded head that is trained waits with it for the pass's end.
    gradients = _gradients_before(shape, step)
    if not gradients or step.parallelism.shards.weights:
        gradients += shape.head_gradient_bytes
    head = _head_gathered(shape, step) if shape.head_gradient_bytes else 0
    moments = []
    for index in reversed(range(len(layers))):
        layer = layers[index]
        if layer.offloaded:
            waiting.pop()
        count = IN_FLIGHT_FORWARD if index > last else IN_FLIGHT_BACKWARD
        parts = {"activations kept": kept[index] + sum(waiting[-count:]), GRADIENTS: gradients + layer.gradients}
        if step.accumulation == 1:
            gradients += step.parallelism.gradients_held(shape.blocks[index].gradient_bytes)
        working = {**layer.backward, "head, gathered": head} if head else layer.backward
        if index == len(layers) - 1 and shape.is_fused and shape.has_head:
            # Its memory has no room for low-rank columns; autograd holds it beside the copy that has.
            working = {**working, "gradient of the last norm's input": _hidden(shape, step.tokens)}
        moments.append(_Moment(parts, working))
    return _highest(moments)


def _embedding(shape: ModelShape, step: Step) -> _Moment:
    """The end of the backward pass: the gradient of the embedding is made, and added to what there is of it."""
    # Of one that is sharded, the whole gradient is made beside the share.
    shards, own = step.parallelism.shards, shape.embedding_gradient_bytes
    again = own if shape.is_tied or step.accumulation > 1 or shards.gradients else 0
    working = {"gradient of the embedding": again, "gradient of its output": _hidden(shape, step.tokens)}
    if shards.weights and not shards.has_copies:
        working["gradient of it as it passes"] = step.parallelism.summed_bytes(own, shape.trained_element)
    return _Moment({"activations kept": _around(shape, step), GRADIENTS: _gradients(shape, step)}, working)


def _evaluation(shape: ModelShape, step: Step, kept: int) -> _Moment:
    batch, seq = step.eval_batch, step.seq
    hidden = _hidden(shape, batch * seq)
    moments = [_layer(block.memory(batch, seq, "full")).forward for block in dict.fromkeys(shape.blocks)]
    if shape.has_head:
        moments.append({"last layer's output, and normed": 2 * hidden, "logits": evaluation_chunk(shape, batch * seq)})
    return _Moment({"activations kept": kept}, _heaviest(moments))
