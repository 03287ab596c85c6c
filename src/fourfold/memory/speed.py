"""How long a training step takes, from what it must compute and move.

Products with weights and attention are counted in floating-point operations, everything else in the bytes that its
kernels read and write (`models.block_forward`, `block_backward`). The shares of the data sheet's rates that are reached
are those of one H200 (docs/planning.md), and taken for all GPUs alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from fourfold.memory.gpus import Gpu
from fourfold.memory.parallel import ONE_GPU, Parallelism
from fourfold.models.block_memory import BlockMemory, BlockShape
from fourfold.models.model_shape import ModelShape
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
# What the host takes to launch a layer's kernels one by one, in both passes: of the CPUs beside two H200; they differ.
LAUNCH_SECONDS = 5e-3
_FP32 = 4


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
    # The head, forward and back, and its logits: written, read twice, written, read.
    seconds += 4 * tokens * shape.vocab_size * shape.hidden_size / matmul
    seconds += 5 * tokens * shape.vocab_size * shape.blocks[0].element_size / memory
    weights = shape.weights_of_layers
    scatters = parallelism.shards.gradients
    for block, name, weight in zip(shape.blocks, policies, weights, strict=True):
        work, moved = _layer(block, batch, seq, name, gpu)
        # Activations go there and back, weights come once in each pass, all beside the work; what is left over is
        # waited for.
        host = 2 * (moved + (weight if streams else 0))
        peers = 2 * parallelism.gathered_bytes(weight)
        if scatters:
            peers += parallelism.reduced_bytes(block.adapter_parameters * _FP32)
        launched = 0.0 if by_graphs else LAUNCH_SECONDS
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


@lru_cache(maxsize=4096)
def _layer(block: BlockShape, batch: int, seq: int, name: str, gpu: Gpu) -> tuple[float, int]:
    """Seconds of a layer's work in both passes, and bytes of activations that wait in host memory."""
    tokens, policy = batch * seq, POLICIES[name]
    matmul, memory = _rates(gpu, tokens)
    forward, backward = _attention_operations(block, tokens, seq)
    again = 0 if "attention" in policy.keeps else 1
    work = tokens * _product_operations(block, policy.keeps) / matmul
    work += forward * (1 + again) / _attention_rate(block, seq, gpu, *ATTENTION_FORWARD)
    work += backward / _attention_rate(block, seq, gpu, *ATTENTION_BACKWARD)
    work += (tokens * _moved_bytes(block, policy.keeps) + _weight_bytes(block)) / memory
    return work, sum(BlockMemory(block, tokens, name).offloaded().values())


def _product_operations(block: BlockShape, keeps: frozenset[str]) -> int:
    """A token's: forward, gradient of the input, and what is computed again."""
    sizes = block.products
    again = sum(size for name, size in sizes.items() if name in ("qkv", "gate_up") and name not in keeps)
    if "mid" not in keeps:
        again += sizes["out"]
    return 2 * (2 * sum(sizes.values()) + again)


def _attention_operations(block: BlockShape, tokens: int, seq: int) -> tuple[int, int]:
    """Forward and backward, what causality leaves out not counted: two products, and five."""
    scores = tokens * seq * block.features
    return 2 * scores, 5 * scores


def _attention_rate(block: BlockShape, seq: int, gpu: Gpu, share: float, half: int) -> float:
    narrow = NARROW_HEADS if block.head_dim < 128 else 1.0
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
