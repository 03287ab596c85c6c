"""The end of `decode_linear`'s product: what adapters, bias and residual add, the gate, and the result."""

from __future__ import annotations

import triton
import triton.language as tl

from fourfold.kernels.decode_norm_triton import to_operand

__all__ = ["load_low", "load_up", "prefetch_up", "rows_of_program", "store_result"]


@triton.jit
def rows_of_program(
    first_row: tl.tensor,
    row_1: tl.tensor,
    num_rows: tl.tensor,
    ROWS: tl.constexpr,
    ROW_WARPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor]:
    """Of W, a program's [ROW_WARPS * ROWS], and whether there are such."""
    rows = tl.arange(0, ROW_WARPS * ROWS)
    row = first_row + rows
    is_row = row < num_rows
    if ACTIVATION != "":
        row = first_row + rows // ROWS * (ROWS // 2) + rows % (ROWS // 2)
        is_row = row < row_1
        row += tl.where(rows % ROWS < ROWS // 2, 0, row_1)
    return row, is_row


@triton.jit
def load_up(
    up_ptr: tl.tensor, row: tl.tensor, is_row: tl.tensor, start: tl.tensor, RANK: tl.constexpr, FEW: tl.constexpr
) -> tl.tensor:
    """[rows, FEW] of an adapter's B, from rank `start` on."""
    at = row.to(tl.int64)[:, None] * RANK + (start + tl.arange(0, FEW))[None, :]
    return tl.load(up_ptr + at, mask=is_row[:, None], other=0.0)


@triton.jit
def prefetch_up(up_ptr: tl.tensor, row: tl.tensor, is_row: tl.tensor, RANK: tl.constexpr, LOOKUP: tl.constexpr) -> None:
    """An adapter's B on its way to the L2 cache, which takes no register until it is needed."""
    if LOOKUP != "gather":
        # As sectors of 32 bytes.
        own = tl.where(is_row, row, 0).to(tl.int64) * RANK
        at = (up_ptr + own)[:, None] + tl.arange(0, RANK // 16)[None, :] * 16
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [at.to(tl.int64)],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def load_low(low_ptr: tl.tensor, at: tl.tensor, FEW: tl.constexpr) -> tl.tensor:
    """fp32 [rows, FEW]: of what x has become by an adapter's A, from `at` [rows] on."""
    return tl.load(low_ptr + (at[:, None] + tl.arange(0, FEW)[None, :])).to(tl.float32)


@triton.jit
def store_result(
    out_ptr: tl.tensor,
    result: tl.tensor,
    bias_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    residual: tl.tensor,
    row: tl.tensor,
    is_row: tl.tensor,
    inputs: tl.tensor,
    mask: tl.tensor,
    num_inputs: tl.tensor,
    first_row: tl.tensor,
    row_1: tl.tensor,
    num_rows: tl.tensor,
    out_scale: tl.tensor,
    IS_LOADED: tl.constexpr,
    TILES: tl.constexpr,
    OWN_TILES: tl.constexpr,
    OUT_ROWS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    DTYPE: tl.constexpr,
) -> None:
    """fp32 [rows of W of this program, rows of x] with the bias, rounded, and then with the residual or gated.

    Args:
        TILES, OWN_TILES: That there are room and sums for, of OUT_ROWS rows of the result.
        residual: What `residual_ptr` has, if that IS_LOADED.
        row, is_row: Of W: see `rows_of_program`.
        inputs: Rows of x, of which there are num_inputs.
        mask: Whether a sum is one of the result.
    """
    if bias_ptr is not None:
        result += tl.load(bias_ptr + row, mask=is_row, other=0.0).to(tl.float32)[:, None]
    if ACTIVATION == "":
        at = inputs[None, :] * num_rows + row[:, None]
        rounded = result.to(DTYPE)
        if residual_ptr is not None:
            if not IS_LOADED:
                residual = tl.load(residual_ptr + at, mask=mask, other=0.0)
            rounded = (residual.to(tl.float32) + rounded.to(tl.float32)).to(DTYPE)
        tl.store(out_ptr + at, rounded, mask=mask)
    else:
        ALL_ROWS: tl.constexpr = TILES * OUT_ROWS
        INPUTS: tl.constexpr = result.shape[1]
        halves = result.to(DTYPE).reshape(TILES, 2, OUT_ROWS, INPUTS).permute(0, 2, 3, 1)
        gate, gated = tl.split(halves.reshape(ALL_ROWS, INPUTS, 2))
        gate = gate.to(tl.float32)
        activated = (gate / (1.0 + tl.exp(-gate))).to(DTYPE).to(tl.float32)
        y = (activated * gated.to(tl.float32)).to(DTYPE).to(tl.float32) * out_scale
        out_row = first_row + tl.arange(0, ALL_ROWS)
        is_row = out_row < row_1
        if OWN_TILES < TILES:
            is_row = is_row & (tl.arange(0, ALL_ROWS) < OWN_TILES * OUT_ROWS)
        mask = is_row[:, None] & (inputs < num_inputs)[None, :]
        tl.store(out_ptr + inputs[None, :] * row_1 + out_row[:, None], to_operand(y), mask=mask)
