"""The Triton kernel of `fourfold.kernels.cross_entropy`: one program a row, the row read twice."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["cross_entropy_kernel", "cross_entropy_triton"]

# 1,024 threads of two 16-byte loads each keep 32 KiB of a processor's reads under way, which is what its share of
# the bandwidth times the latency asks for. One program a processor also means 132 rows of 250 KiB at a time on an
# H200, which its 50 MiB of L2 cache hold in good part until the second reading.
_NUM_WARPS = 32
_LOADS = 2

# exp2 is one instruction, where exp adds three for arguments whose result is no normal number.
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def cross_entropy_kernel(  # type: ignore[no-untyped-def]
    logits_ptr,  # [tokens, vocab] of stride row_stride, 1
    targets_ptr,  # int64 [tokens]
    loss_ptr,  # fp32 [tokens]
    ranked_first_ptr,  # int8 [tokens]
    row_stride,
    VOCAB: tl.constexpr,
    GRADIENT: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * row_stride
    target = tl.load(targets_ptr + row).to(tl.int32)
    # Each row of a tile is one thread's vector load, so that sums over it stay in the thread; threads meet once, at
    # the end of the row.
    lanes = tl.arange(0, LANES)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    TILES: tl.constexpr = (VOCAB + LANES * WIDTH - 1) // (LANES * WIDTH)
    if target == -100:
        if GRADIENT:
            for tile in range(TILES):
                at = tile * (LANES * WIDTH) + lanes
                nothing = tl.zeros([LANES, WIDTH], logits_ptr.dtype.element_ty)
                tl.store(logits_ptr + at, nothing, mask=at < VOCAB)
        tl.store(loss_ptr + row, 0.0)
        tl.store(ranked_first_ptr + row, 0)
        return

    # A target that no column has makes a loss that is no number, which stops the run.
    is_column = (target >= 0) & (target < VOCAB)
    wanted = tl.load(logits_ptr + target, mask=is_column, other=float("nan")).to(tl.float32)
    # Finite, so that a lane that has seen nothing but -inf (masked words, the row's end) subtracts no infinities.
    greatest = tl.full([LANES], -1e38, tl.float32)
    total = tl.zeros([LANES], tl.float32)
    first = tl.full([LANES], 2147483647, tl.int32)
    for tile in range(TILES):
        at = tile * (LANES * WIDTH) + lanes
        x = tl.load(logits_ptr + at, mask=at < VOCAB, other=float("-inf")).to(tl.float32)
        new = tl.maximum(greatest, tl.max(x, axis=1))
        total = total * tl.exp2((greatest - new) * _LOG2_E) + tl.sum(tl.exp2((x - new[:, None]) * _LOG2_E), axis=1)
        greatest = new
        # Where the target's value first stands: 16-bit logits often tie for the first rank.
        first = tl.minimum(first, tl.min(tl.where(x == wanted, at, 2147483647), axis=1))
    maximum = tl.max(greatest, axis=0)
    total_exp = tl.sum(total * tl.exp2((greatest - maximum) * _LOG2_E), axis=0)
    tl.store(loss_ptr + row, tl.log(total_exp) + (maximum - wanted))
    is_first = (wanted == maximum) & (tl.min(first, axis=0) == target)
    tl.store(ranked_first_ptr + row, is_first.to(tl.int8))

    if GRADIENT:
        scale = 1.0 / total_exp
        # From the end to the start: what was read last is what the cache still holds.
        for step in range(TILES):
            at = (TILES - 1 - step) * (LANES * WIDTH) + lanes
            x = tl.load(logits_ptr + at, mask=at < VOCAB, other=float("-inf")).to(tl.float32)
            slope = tl.exp2((x - maximum) * _LOG2_E) * scale
            slope = tl.where(at == target, slope - 1.0, slope)
            tl.store(logits_ptr + at, slope.to(logits_ptr.dtype.element_ty), mask=at < VOCAB)


def cross_entropy_triton(logits: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """`cross_entropy_` for fp16, bf16 and fp32."""
    if logits.stride(1) != 1:
        raise ValueError(f"the logits' last stride must be 1, found {logits.stride()}")
    rows, vocab = logits.shape
    loss = torch.empty(rows, dtype=torch.float32, device=logits.device)
    ranked_first = torch.empty(rows, dtype=torch.bool, device=logits.device)
    if rows == 0:
        return loss, ranked_first
    arguments = (logits, targets.contiguous(), loss, ranked_first.view(torch.int8), logits.stride(0))
    width = 16 // logits.element_size()
    # A vocabulary of no whole vectors is loaded by elements, each with an address and a mask in registers.
    lanes = (_LOADS if vocab % width == 0 else 1) * _NUM_WARPS * 32

    def launch() -> None:
        cross_entropy_kernel[(rows,)](
            *arguments,
            VOCAB=vocab,
            GRADIENT=gradient,
            LANES=lanes,
            WIDTH=width,
            num_warps=_NUM_WARPS,
        )

    if logits.is_cuda and logits.device.index != torch.cuda.current_device():
        with torch.cuda.device(logits.device):
            launch()
    else:
        launch()
    return loss, ranked_first
