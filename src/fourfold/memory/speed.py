"""How long a training step takes, from what it must compute and move.

Products with weights and attention are counted in floating-point operations, everything else in the bytes that its
kernels read and write (`models.block_forward`, `block_backward`). Of layers on the generic path both are those of the
operators that were seen (`models.following`), an estimate that was never measured. The shares of the data sheet's rates
that are reached are those of one H200 (docs/planning.md), and taken for all GPUs alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from fourfold.memory.gpus import Gpu
from fourfold.memory.parallel import ONE_GPU, Parallelism
from fourfold.models.block_memory import BlockMemory, BlockShape
from fourfold.models.followed_layer import FollowedLayer
from fourfold.models.model_shape import LayerShape, ModelShape
from fourfold.models.recomputation import POLICIES

__all__ = ["reduction_seconds", "step_seconds", "update_seconds"]

# Shares of the data sheet's rates.
MATMUL_SHARE, MEMORY_SHARE = 0.68, 0.78
# Products with few rows do not fill a large GPU: at this many tokens they reach half of the share.
HALF_RATE_TOKENS = 80
# Attention: the share that rows without end reach, and the tokens of a row at which it is half of that.
ATTENTION_FORWARD, ATTENTION_BACKWARD = (0.60, 376), (0.57, 946)
# Of that, with heads narrower than 128.
NARROW_HEADS = 0.75
# Before the first layer is launched, and gaps between kernels, by layer.
START_SECONDS, LAYER_SECONDS = 2e-3, 1e-4
# What the host takes to launch kernels one by one, in both passes: those of a fused block, those for each part of its
# rows that the MLP works on at once, and each of PyTorch's operators on the generic path. Those are the figures of the
# slowest CPU beside three H200; another took half of the first. A way that such a host would hold up is lost there by
# much more than is won elsewhere. The last was never measured alone.
BLOCK_LAUNCH_SECONDS, PART_LAUNCH_SECONDS, OPERATOR_LAUNCH_SECONDS = 8e-3, 1.2e-3, 1e-5
# Products in fp32 are that much slower (an H200's data sheet: 989 and 67 TFLOPS).
WIDE = 15


def step_seconds(
    shape: ModelShape,
    gpu: Gpu,
    batch: int,
    seq: int,
    policies: Sequence[str],
    *,
    streams: bool = False,
    by_graphs: bool = False,
    parallelism: Parallelism = ONE_GPU,
) -> float:
    """Seconds of one forward and backward pass over a GPU's microbatch, with the update's share left out."""
    tokens = batch * seq
    matmul, memory = _rates(gpu, tokens)
    seconds = START_SECONDS
    # The head, forward and back, and its logits: written, read twice, written, read. A trained one has a gradient, too.
    passes = 6 if shape.head_gradient_bytes else 4
    seconds += passes * tokens * shape.vocab_size * shape.hidden_size / matmul
    seconds += 5 * tokens * shape.vocab_size * shape.element_size / memory
    weights = shape.weights_of_layers
    scatters = parallelism.shards.gradients
    for block, name, weight in zip(shape.blocks, policies, weights, strict=True):
        work, launches, moved = _layer(block, batch, seq, name, gpu)
        # Activations go there and back, weights come once in each pass, all beside the work; what is left over is
        # waited for.
        host = 2 * (moved + (weight if streams else 0))
        peers = 2 * parallelism.gathered_bytes(weight)
        if scatters:
            peers += parallelism.reduced_bytes(block.gradient_bytes)
        launched = 0.0 if by_graphs else launches
        seconds += max(work, launched, _transfer_seconds(gpu, host, peers)) + LAYER_SECONDS
    return seconds


def update_seconds(gpu: Gpu, trained: int, state: int, paged: int = 0) -> float:
    """Seconds of an optimizer's update: gradients are read twice, for their norm and for the update, weights and state
    read and written. Pages come and go at once, beside that; the slower of both is waited for.

    Args:
        trained: Bytes of trained weights; their gradients take the same.
        state: Bytes of the optimizer's state, wherever it is.
        paged: Those of it that live in host memory.
    """
    return max((4 * trained + 2 * state) / (gpu.memory_rate * MEMORY_SHARE), paged / gpu.link_rate)


def reduction_seconds(gpu: Gpu, gradients: int, parallelism: Parallelism, microbatch: float) -> float:
    """Seconds by which reducing whole gradients, once in an optimizer step, outlasts the last backward pass, which is
    at least half of a microbatch's time and runs beside it."""
    if parallelism.shards.gradients:
        return 0.0
    return max(0.0, _transfer_seconds(gpu, 0, parallelism.reduced_bytes(gradients)) - microbatch / 2)


def _transfer_seconds(gpu: Gpu, host: int, peers: int) -> float:
    if gpu.peer_rate is None:
        return (host + peers) / gpu.link_rate
    return max(host / gpu.link_rate, peers / gpu.peer_rate)


def _rates(gpu: Gpu, tokens: int) -> tuple[float, float]:
    """Of products with weights in operations a second, and of memory in bytes a second."""
    filled = tokens / (tokens + HALF_RATE_TOKENS)
    return gpu.matmul_rate * MATMUL_SHARE * filled, gpu.memory_rate * MEMORY_SHARE


def _layer(block: LayerShape, batch: int, seq: int, name: str, gpu: Gpu) -> tuple[float, float, int]:
    """Seconds of a layer's work in both passes, those that the host takes to launch all of it, and bytes of activations
    that wait in host memory."""
    if isinstance(block, BlockShape):
        return _block(block, batch, seq, name, gpu)
    assert isinstance(block, FollowedLayer)
    return _followed(block, batch, seq, name, gpu)


@lru_cache(maxsize=4096)
def _block(block: BlockShape, batch: int, seq: int, name: str, gpu: Gpu) -> tuple[float, float, int]:
    tokens, policy = batch * seq, POLICIES[name]
    matmul, memory = _rates(gpu, tokens)
    work = tokens * _product_operations(block, policy.keeps) / matmul
    work += _attention_seconds(block, tokens, seq, policy.keeps, gpu)
    work += (tokens * _moved_bytes(block, policy.keeps) + _weight_bytes(block)) / memory
    held = BlockMemory(block, tokens, name)
    launching = BLOCK_LAUNCH_SECONDS + -(-tokens // held.part) * PART_LAUNCH_SECONDS
    return work, launching, sum(held.offloaded().values())


def _followed(block: FollowedLayer, batch: int, seq: int, name: str, gpu: Gpu) -> tuple[float, float, int]:
    tokens, followed = batch * seq, block.memory(batch, seq, name).followed
    matmul, memory = _rates(gpu, tokens)
    work = _attention_seconds(block, tokens, seq, POLICIES[name].keeps, gpu)
    for each in (followed.forward, followed.backward):
        # Where all of it is in fp32, so is what the shares were measured with.
        wide = each.wide_operations * (WIDE if each.operations else 1)
        work += (each.operations + wide) / matmul + each.moved_bytes / memory
    return work, (followed.forward.launches + followed.backward.launches) * OPERATOR_LAUNCH_SECONDS, 0


def _product_operations(block: BlockShape, keeps: frozenset[str]) -> int:
    """A token's: forward, gradient of the input, and what is computed again."""
    sizes = block.products
    again = sum(size for name, size in sizes.items() if name in ("qkv", "gate_up") and name not in keeps)
    if "mid" not in keeps:
        again += sizes["out"]
    return 2 * (2 * sum(sizes.values()) + again)


def _attention_seconds(
    block: BlockShape | FollowedLayer, tokens: int, seq: int, keeps: frozenset[str], gpu: Gpu
) -> float:
    """Two products forward, once more where they are computed again, and five back; what causality leaves out is not
    counted."""
    scores = tokens * seq * block.features
    again = 0 if "attention" in keeps else 1
    forward = 2 * scores * (1 + again) / _attention_rate(block.head_dim, seq, gpu, *ATTENTION_FORWARD)
    return forward + 5 * scores / _attention_rate(block.head_dim, seq, gpu, *ATTENTION_BACKWARD)


def _attention_rate(head_dim: int, seq: int, gpu: Gpu, share: float, half: int) -> float:
    narrow = NARROW_HEADS if head_dim < 128 else 1.0
    return gpu.matmul_rate * share * narrow * seq / (seq + half)


def _weight_bytes(block: BlockShape) -> int:
    """Dequantizing, once in each pass: codes are read, 16-bit weights written."""
    return int(2 * sum(block.products.values()) * (0.53 + block.element_size))


def _moved_bytes(block: BlockShape, keeps: frozenset[str]) -> int:
    """A token's activations that kernels beside the products read and write."""
    hidden, features, qkv, wide = block.hidden, block.features, block.qkv_width, block.intermediate
    forward = 9 * hidden + 2 * qkv + 2 * features + 3 * wide
    backward = 12 * hidden + 3 * qkv + features + 7 * wide
    again = (2 * qkv + 3 * hidden if "qkv" not in keeps else 0) + (3 * hidden if "gate_up" not in keeps else 0)
    return block.element_size * (forward + backward + again)
