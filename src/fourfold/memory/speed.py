"""How long a training step takes, from what it must compute and move.

Products with weights and attention are counted in floating-point operations, everything else in the bytes that its
kernels read and write (`models.block_forward`, `block_backward`). Of layers on the generic path both are those of the
operators that were seen (`models.following`), an estimate that was never measured. The shares of the data sheet's rates
that are reached are those of one H200 (docs/planning.md), and taken for all GPUs alike.
"""

from __future__ import annotations

from collections.abc import Sequence

from fourfold.memory.gpus import Gpu
from fourfold.models.block_memory import BlockShape
from fourfold.models.followed_layer import FollowedLayer
from fourfold.models.model_shape import LayerShape, ModelShape
from fourfold.models.recomputation import POLICIES

__all__ = ["step_seconds"]

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
# Products in fp32 are that much slower (an H200's data sheet: 989 and 67 TFLOPS), and launching an operator of PyTorch,
# forward or back, takes the host that long.
WIDE, LAUNCH_SECONDS = 15, 1e-5


def step_seconds(
    shape: ModelShape, gpu: Gpu, batch: int, seq: int, policies: Sequence[str], *, streams: bool = False
) -> float:
    """Seconds of one forward and backward pass over a microbatch, with the update's share left out."""
    tokens = batch * seq
    rates = _Rates(gpu, tokens, seq)
    seconds = START_SECONDS
    # The head, forward and back, and its logits: written, read twice, written, read. A trained one has a gradient, too.
    passes = 6 if shape.head_gradient_bytes else 4
    seconds += passes * tokens * shape.vocab_size * shape.hidden_size / rates.matmul
    seconds += 5 * tokens * shape.vocab_size * shape.element_size / rates.memory
    weights = shape.layer_bytes if streams else (0,) * len(shape.blocks)
    for block, name, weight in zip(shape.blocks, policies, weights, strict=True):
        work = _work(block, batch, seq, name, rates)
        memory = block.memory(batch, seq, name) if POLICIES[name].offload else None
        moved = 0 if memory is None else sum(memory.offloaded().values())
        # Activations go there and back, weights come once in each pass, all beside the work; what is left over is
        # waited for.
        work = max(work, 2 * (moved + weight) / gpu.link_rate)
        seconds += work + LAYER_SECONDS
    return seconds


class _Rates:
    """What a GPU reaches with a microbatch: operations and bytes a second."""

    def __init__(self, gpu: Gpu, tokens: int, seq: int) -> None:
        self.matmul = gpu.matmul_rate * MATMUL_SHARE * tokens / (tokens + HALF_RATE_TOKENS)
        self.memory = gpu.memory_rate * MEMORY_SHARE
        self._peak, self._seq = gpu.matmul_rate, seq

    def attention(self, head_dim: int, share: float, half: int) -> float:
        narrow = NARROW_HEADS if head_dim < 128 else 1.0
        return self._peak * share * narrow * self._seq / (self._seq + half)


def _work(block: LayerShape, batch: int, seq: int, name: str, rates: _Rates) -> float:
    """Seconds of a layer's passes."""
    assert isinstance(block, (BlockShape, FollowedLayer))
    tokens, keeps = batch * seq, POLICIES[name].keeps
    # What causality leaves out is not counted: two products forward, and five back.
    scores = tokens * seq * block.features
    again = 0 if "attention" in keeps else 1
    attention = 2 * scores * (1 + again) / rates.attention(block.head_dim, *ATTENTION_FORWARD)
    attention += 5 * scores / rates.attention(block.head_dim, *ATTENTION_BACKWARD)
    if isinstance(block, BlockShape):
        moved = tokens * _moved_bytes(block, keeps) + _weight_bytes(block)
        return attention + tokens * _product_operations(block, keeps) / rates.matmul + moved / rates.memory
    followed = block.memory(batch, seq, name).followed
    work = attention
    for each in (followed.forward, followed.backward):
        # Where all of it is in fp32, so is what the shares were measured with.
        wide = each.wide_operations * (WIDE if each.operations else 1)
        work += (each.operations + wide) / rates.matmul + each.moved_bytes / rates.memory
    return max(work, (followed.forward.launches + followed.backward.launches) * LAUNCH_SECONDS)


def _products(block: BlockShape) -> dict[str, int]:
    """Weights of each group."""
    return {
        "qkv": block.qkv_width * block.hidden,
        "out": block.features * block.hidden,
        "gate_up": 2 * block.intermediate * block.hidden,
        "down": block.intermediate * block.hidden,
    }


def _product_operations(block: BlockShape, keeps: frozenset[str]) -> int:
    """A token's: forward, gradient of the input, and what is computed again."""
    sizes = _products(block)
    again = sum(size for name, size in sizes.items() if name in ("qkv", "gate_up") and name not in keeps)
    if "mid" not in keeps:
        again += sizes["out"]
    return 2 * (2 * sum(sizes.values()) + again)


def _weight_bytes(block: BlockShape) -> int:
    """Dequantizing, once in each pass: codes are read, 16-bit weights written."""
    return int(2 * sum(_products(block).values()) * (0.53 + block.element_size))


def _moved_bytes(block: BlockShape, keeps: frozenset[str]) -> int:
    """A token's activations that kernels beside the products read and write."""
    hidden, features, qkv, wide = block.hidden, block.features, block.qkv_width, block.intermediate
    forward = 9 * hidden + 2 * qkv + 2 * features + 3 * wide
    backward = 12 * hidden + 3 * qkv + features + 7 * wide
    again = (2 * qkv + 3 * hidden if "qkv" not in keeps else 0) + (3 * hidden if "gate_up" not in keeps else 0)
    return block.element_size * (forward + backward + again)
