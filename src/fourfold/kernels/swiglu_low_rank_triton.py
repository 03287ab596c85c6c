# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton kernels of swiglu.py that multiply by the adapters' matrices what they hold on the chip.

The forward kernel's programs own rows and pass over all columns or a share of them, for the product is a sum over
columns; the backward kernel's own columns and pass over a share of the rows, for its products are sums over tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.launching import Tile, cdiv, is_hopper, next_power_of_2, on_device, rank_block
from fourfold.kernels.low_rank import fill_columns, new_extended
from fourfold.kernels.shares_triton import Pass, add_up, sum_shares, sum_tile
from fourfold.kernels.swiglu_triton import activation_and_slope

__all__ = ["LONG", "MANY_RANKS", "SHORT", "swiglu_backward_sums_", "swiglu_product"]


# For many tokens on Hopper; for fewer, and for other GPUs; for ranks whose sums do not fit into those two's registers.
LONG = Pass(32, 256, 8, 3, programs=132, wide_first=True)
SHORT = Pass(16, 128, 4, 4, programs=528, max_registers=128)
MANY_RANKS = Pass(32, 128, 8, 3, programs=132, wide_first=True)
MANY_ROWS = 4096
# Where there are many tokens and one turn of programs would leave more than a fifth of the places empty, there are
# several turns, so that some work while others begin and end.
TURNS = 3
# Of a share: more shares cost more in sums to add up than they save.
MINIMUM_ROWS = 128

# Of the forward kernel. The shares of the columns depend on nothing else, so that a token's sums are the same whatever
# other tokens it stands among; two shares of the widest rows are enough programs for 2,048 tokens.
FORWARD_TILE = Tile(16, 256, 4)
MAXIMUM_COLUMNS = 7168


@triton.jit
def _settled(tile):
    """The tile itself.

    A reduction over an axis of one element, which moves nothing, is what the compiler computes nothing anew across. It
    would else compute the tile twice: as it is stored, and again as the tensor cores take it. It is a sum because the
    interpreter goes through any other reduction element by element.
    """
    return tl.sum(tl.reshape(tile, [tile.shape[0], tile.shape[1], 1]), 2)


@triton.jit
def swiglu_product_kernel(
    gate_up_ptr,  # [M, 2I]
    projection_ptr,  # [R, I]
    out_ptr,  # [M, I + R]
    product_ptr,  # the R columns of out, or fp32 [shares, M, R]
    num_rows,
    in_stride,
    projection_stride,
    out_stride,
    product_stride,
    SHARE: tl.constexpr,  # columns of a program
    I: tl.constexpr,  # noqa: E741
    R: tl.constexpr,
    GELU: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    rows, ranks = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_R)
    row_mask = first + rows < num_rows
    in_offsets = rows[:, None] * in_stride
    out_offsets = rows[:, None] * out_stride
    acc = tl.zeros([BLOCK_M, BLOCK_R], tl.float32)
    share = tl.program_id(1)
    for start in range(0, SHARE, BLOCK_K):
        columns = share * SHARE + start + tl.arange(0, BLOCK_K)
        mask = row_mask[:, None] & (columns < I)[None, :]
        gate_at = gate_up_ptr + first * in_stride + (in_offsets + columns[None, :])
        gate = tl.load(gate_at, mask, 0.0).to(tl.float32)
        up = tl.load(gate_at + I, mask, 0.0).to(tl.float32)
        projection_at = projection_ptr + ranks[:, None] * projection_stride + columns[None, :]
        projection = tl.load(projection_at, (ranks < R)[:, None] & (columns < I)[None, :], 0.0)
        value, _ = activation_and_slope(gate, GELU, False)
        y = _settled((value.to(dtype).to(tl.float32) * up).to(dtype))
        tl.store(out_ptr + first * out_stride + (out_offsets + columns[None, :]), y, mask)
        acc = tl.dot(y, tl.trans(projection), acc)
    product_rows = share.to(tl.int64) * num_rows + first + rows
    product_at = product_ptr + product_rows[:, None] * product_stride + ranks[None, :]
    tl.store(product_at, acc.to(product_ptr.dtype.element_ty), row_mask[:, None] & (ranks < R)[None, :])


@triton.jit
def _low_tile(low_ptr, row, rows, stride, mask, ranks, R: tl.constexpr):
    low_at = low_ptr + row * stride + (rows[:, None] * stride + ranks[None, :])
    return tl.load(low_at, mask & (ranks < R)[None, :], 0.0)


@triton.jit
def _store_sum(sums_ptr, acc, columns, ranks, I: tl.constexpr, R: tl.constexpr, WIDE_FIRST: tl.constexpr):  # noqa: E741
    if not WIDE_FIRST:
        acc = tl.trans(acc)
    tl.store(sums_ptr + columns[:, None] + ranks[None, :] * I, acc, (columns < I)[:, None] & (ranks < R)[None, :])


@triton.jit
def swiglu_backward_sums_kernel(
    gate_up_ptr,  # [M, 2I]
    out_ptr,  # gate_up_ptr, once more: what is stored has addresses that need no registers until then
    grad_ptr,  # [M, I]
    low_ptr,  # [M, GATE_RANK + UP_RANK]
    grad_low_ptr,  # [M, DOWN_RANK]
    sums_ptr,  # fp32 [shares, GATE_RANK + UP_RANK + DOWN_RANK, I]
    num_rows,
    share_rows,  # of a program
    gate_up_stride,
    grad_stride,
    low_stride,
    grad_low_stride,
    SHARE: tl.constexpr,  # share_rows, or 0 where the compiler need not know them
    I: tl.constexpr,  # noqa: E741
    GELU: tl.constexpr,
    GATE_RANK: tl.constexpr,
    UP_RANK: tl.constexpr,
    DOWN_RANK: tl.constexpr,
    BLOCK_GATE: tl.constexpr,
    BLOCK_UP: tl.constexpr,
    BLOCK_DOWN: tl.constexpr,
    WIDE_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    dtype: tl.constexpr = grad_ptr.dtype.element_ty
    columns = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    column_mask = (columns < I)[None, :]
    share = tl.program_id(1)
    rows = tl.arange(0, BLOCK_M)
    gate_ranks, up_ranks, down_ranks = tl.arange(0, BLOCK_GATE), tl.arange(0, BLOCK_UP), tl.arange(0, BLOCK_DOWN)
    gate_offsets = rows[:, None] * gate_up_stride + columns[None, :]
    grad_offsets = rows[:, None] * grad_stride + columns[None, :]
    if WIDE_FIRST:
        gate_sum = tl.zeros([BLOCK_K, BLOCK_GATE], tl.float32)
        up_sum = tl.zeros([BLOCK_K, BLOCK_UP], tl.float32)
        down_sum = tl.zeros([BLOCK_K, BLOCK_DOWN], tl.float32)
    else:
        gate_sum = tl.zeros([BLOCK_GATE, BLOCK_K], tl.float32)
        up_sum = tl.zeros([BLOCK_UP, BLOCK_K], tl.float32)
        down_sum = tl.zeros([BLOCK_DOWN, BLOCK_K], tl.float32)
    first = share * share_rows
    for start in range(0, SHARE if SHARE > 0 else share_rows, BLOCK_M):
        row = (first + start).to(tl.int64)
        row_mask = (row + rows < num_rows)[:, None]
        mask = row_mask & column_mask
        gate_at = gate_up_ptr + row * gate_up_stride + gate_offsets
        grad = tl.load(grad_ptr + row * grad_stride + grad_offsets, mask, 0.0).to(tl.float32)
        gate = tl.load(gate_at, mask, 0.0).to(tl.float32)
        up = tl.load(gate_at + I, mask, 0.0).to(tl.float32)
        value, derivative = activation_and_slope(gate, GELU, False)
        value = value.to(dtype).to(tl.float32)
        dgate = _settled((grad * up * derivative).to(dtype))
        dup = _settled((grad * value).to(dtype))
        out_at = out_ptr + row * gate_up_stride + gate_offsets
        tl.store(out_at, dgate, mask)
        tl.store(out_at + I, dup, mask)
        if GATE_RANK > 0:
            low = _low_tile(low_ptr, row, rows, low_stride, row_mask, gate_ranks, GATE_RANK)
            gate_sum = sum_tile(dgate, low, gate_sum, WIDE_FIRST)
        if UP_RANK > 0:
            low = _low_tile(low_ptr + GATE_RANK, row, rows, low_stride, row_mask, up_ranks, UP_RANK)
            up_sum = sum_tile(dup, low, up_sum, WIDE_FIRST)
        if DOWN_RANK > 0:
            low = _low_tile(grad_low_ptr, row, rows, grad_low_stride, row_mask, down_ranks, DOWN_RANK)
            down_sum = sum_tile(_settled((value * up).to(dtype)), low, down_sum, WIDE_FIRST)
    sums_at = sums_ptr + share.to(tl.int64) * (GATE_RANK + UP_RANK + DOWN_RANK) * I
    if GATE_RANK > 0:
        _store_sum(sums_at, gate_sum, columns, gate_ranks, I, GATE_RANK, WIDE_FIRST)
    if UP_RANK > 0:
        _store_sum(sums_at + GATE_RANK * I, up_sum, columns, up_ranks, I, UP_RANK, WIDE_FIRST)
    if DOWN_RANK > 0:
        _store_sum(sums_at + (GATE_RANK + UP_RANK) * I, down_sum, columns, down_ranks, I, DOWN_RANK, WIDE_FIRST)


@triton.jit
def _sum_columns(
    out_ptr,
    shares_ptr,
    size,
    columns,
    scaling,
    I: tl.constexpr,  # noqa: E741
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    SHARES: tl.constexpr,
    ADD: tl.constexpr,
    BY_COLUMN: tl.constexpr,
):
    ranks = tl.arange(0, BLOCK_R)
    mask = (ranks < R)[:, None] & (columns < I)[None, :]
    index = ranks[:, None] * I + columns[None, :]
    total = add_up(shares_ptr, index, mask, size, SHARES) * scaling
    out_at = out_ptr + (ranks[:, None] + columns[None, :] * R if BY_COLUMN else index)
    if ADD:
        total += tl.load(out_at, mask, 0.0)
    tl.store(out_at, total, mask)


@triton.jit
def sum_columns_kernel(
    out_ptr,  # fp32: gate's and up's [I, rank], as B's gradient is, and down's [rank, I], as A's is
    shares_ptr,  # fp32 [SHARES, GATE_RANK + UP_RANK + DOWN_RANK, I]
    gate_scaling,
    up_scaling,
    I: tl.constexpr,  # noqa: E741
    GATE_RANK: tl.constexpr,
    UP_RANK: tl.constexpr,
    DOWN_RANK: tl.constexpr,
    BLOCK_GATE: tl.constexpr,
    BLOCK_UP: tl.constexpr,
    BLOCK_DOWN: tl.constexpr,
    SHARES: tl.constexpr,
    ADD: tl.constexpr,  # to what out holds
    BLOCK: tl.constexpr,
):
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    which = tl.program_id(1)
    size: tl.constexpr = (GATE_RANK + UP_RANK + DOWN_RANK) * I
    if which == 0:
        if GATE_RANK > 0:
            _sum_columns(out_ptr, shares_ptr, size, columns, gate_scaling, I, GATE_RANK, BLOCK_GATE, SHARES, ADD, True)
    elif which == 1:
        if UP_RANK > 0:
            up: tl.constexpr = GATE_RANK * I
            _sum_columns(
                out_ptr + up, shares_ptr + up, size, columns, up_scaling, I, UP_RANK, BLOCK_UP, SHARES, ADD, True
            )
    elif DOWN_RANK > 0:
        down: tl.constexpr = (GATE_RANK + UP_RANK) * I
        _sum_columns(
            out_ptr + down, shares_ptr + down, size, columns, 1.0, I, DOWN_RANK, BLOCK_DOWN, SHARES, ADD, False
        )


SUM_COLUMNS = 64


def forward_stages(rank: int) -> int:
    """Tiles under way in the forward kernel: those of a large projection leave room for one less."""
    return 3 if rank <= 32 else 2


def _divide(size: int, count: int, block: int) -> tuple[int, int]:
    """(what is in a share, shares) of `size` in about `count` shares of whole blocks, none of them empty."""
    share = max(1, cdiv(cdiv(size, count), block)) * block
    return share, max(1, cdiv(size, share))


def swiglu_product(gate_up: Tensor, projection: Tensor, activation: str = "silu") -> Tensor:
    """`swiglu.swiglu` for a projection of 1 to 64 rows, whose last stride is 1, and 16-bit tensors."""
    num_rows, width, rank = gate_up.shape[0], gate_up.shape[1] // 2, projection.shape[0]
    tile = FORWARD_TILE
    out = new_extended(gate_up, num_rows, width, rank)
    share, shares = _divide(width, cdiv(width, MAXIMUM_COLUMNS), tile.block_k)
    product = out[:, width:]
    if shares > 1:
        product = torch.empty(shares, num_rows, rank, dtype=torch.float32, device=gate_up.device)
    with on_device(gate_up):
        swiglu_product_kernel[(cdiv(num_rows, tile.block_m), shares)](
            gate_up,
            projection,
            out,
            product,
            num_rows,
            gate_up.stride(0),
            projection.stride(0),
            out.stride(0),
            product.stride(-2),
            SHARE=share,
            I=width,
            R=rank,
            GELU=activation == "gelu_tanh",
            BLOCK_R=rank_block(rank),
            BLOCK_M=tile.block_m,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=forward_stages(rank),
        )
        if shares > 1:
            sum_shares(out[:, width:], product)
    return out


def _backward_pass(grad: Tensor, rank: int, activation: str) -> Pass:
    # GELU needs more registers.
    is_silu = activation == "silu"
    if rank <= (32 if is_silu else 16) and len(grad) >= MANY_ROWS and is_hopper(grad.device):
        return LONG
    return SHORT if rank <= 16 and is_silu else MANY_RANKS


def swiglu_backward_sums_(
    gate_up_ext: Tensor,
    grad: Tensor,
    low: Tensor | None,
    gate_rank: int,
    grad_low: Tensor | None,
    sums: Tensor,
    add: bool,
    projection: Tensor | None = None,
    activation: str = "silu",
    scalings: Sequence[float] = (1.0, 1.0),
    tile: Pass | None = None,
) -> None:
    """`swiglu.swiglu_backward_sums_` for ranks up to 64 and 16-bit tensors."""
    num_rows, width = grad.shape
    up_rank = 0 if low is None else low.shape[1] - gate_rank
    down_rank = 0 if grad_low is None else grad_low.shape[1]
    tile = tile or _backward_pass(grad, max(gate_rank, up_rank, down_rank), activation)
    column_blocks = cdiv(width, tile.block_k)
    count, most = max(1, tile.programs // column_blocks), num_rows // MINIMUM_ROWS
    if num_rows >= MANY_ROWS and 5 * count * column_blocks < 4 * tile.programs:
        count = max(1, TURNS * tile.programs // column_blocks)
    if most < count:
        # A power of two, since sums of each number of shares are compiled anew.
        count = max(1, next_power_of_2(most + 1) // 2)
    share, shares = _divide(num_rows, count, tile.block_m)
    parts = torch.empty(shares, len(sums), dtype=torch.float32, device=grad.device)
    with on_device(grad):
        swiglu_backward_sums_kernel[(column_blocks, shares)](
            gate_up_ext,
            gate_up_ext,
            grad,
            low,
            grad_low,
            parts,
            num_rows,
            share,
            gate_up_ext.stride(0),
            grad.stride(0),
            0 if low is None else low.stride(0),
            0 if grad_low is None else grad_low.stride(0),
            # The interpreter's loops have no other bounds than constants.
            SHARE=0 if grad.is_cuda else share,
            I=width,
            GELU=activation == "gelu_tanh",
            GATE_RANK=gate_rank,
            UP_RANK=up_rank,
            DOWN_RANK=down_rank,
            BLOCK_GATE=rank_block(gate_rank),
            BLOCK_UP=rank_block(up_rank),
            BLOCK_DOWN=rank_block(down_rank),
            WIDE_FIRST=tile.wide_first,
            BLOCK_M=tile.block_m,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
            maxnreg=tile.max_registers,
        )
        sum_columns_kernel[(cdiv(width, SUM_COLUMNS), 3)](
            sums,
            parts,
            *scalings,
            I=width,
            GATE_RANK=gate_rank,
            UP_RANK=up_rank,
            DOWN_RANK=down_rank,
            BLOCK_GATE=rank_block(gate_rank),
            BLOCK_UP=rank_block(up_rank),
            BLOCK_DOWN=rank_block(down_rank),
            SHARES=shares,
            ADD=add,
            BLOCK=SUM_COLUMNS,
            num_warps=4,
        )
    fill_columns(gate_up_ext, 2 * width, projection)
