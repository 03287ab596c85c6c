# mypy: allow-untyped-defs, allow-incomplete-defs
"""AdamW and Lion on the GPU: three launches a step (norm, finish, update), whatever the number of parameters.

Kernels find their tensors by address, in a table that is sent each step: gradients are made anew by each backward pass.
A launch covers the parameters of one `Pack`, so mixed dtypes or mixed state take one norm and one update launch each;
a paged one takes an update launch for each of its pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, distributed

from fourfold.kernels.optimizer_state import (
    BLOCK_SIZE,
    CHUNK_SIZE,
    MOMENTS,
    SMALLEST_ABSMAX,
    Hyperparameters,
    OptimizerState,
    Pack,
)
from fourfold.kernels.shards import sum_over

__all__ = ["finish_kernel", "nearest_code", "norm_kernel", "optimizer_step_triton", "update_kernel", "update_warps"]

NUM_WARPS = 4
FINISH_WARPS = 8
FINISH_BLOCK = 1024
# An update kernel reads eight numbers a parameter, which the finish kernel made: see there.
ROW = 8

_ROWS = tl.constexpr(CHUNK_SIZE // BLOCK_SIZE)
_COLUMNS = tl.constexpr(BLOCK_SIZE)
_HALF = tl.constexpr(BLOCK_SIZE // 2)
_CHUNK = tl.constexpr(CHUNK_SIZE)
_ROW = tl.constexpr(ROW)
_SMALLEST_ABSMAX = tl.constexpr(SMALLEST_ABSMAX)


@triton.jit(do_not_specialize=["first_chunk"])
def norm_kernel(
    address_ptr,  # int64 [2, num_params]: gradients, parameters
    table_ptr,  # int64 [num_params, 2]
    chunk_tensor_ptr,
    chunk_index_ptr,
    partial_ptr,  # fp32 [num_chunks]
    first_chunk,
    DTYPE: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Sum of squares of one chunk of a gradient; 0 where there is no gradient."""
    chunk = first_chunk + tl.program_id(0)
    tensor = tl.load(chunk_tensor_ptr + chunk)
    index = tl.load(chunk_index_ptr + chunk)
    address = tl.load(address_ptr + tensor)
    total = 0.0
    if address != 0:
        numel = tl.load(table_ptr + tensor * 2)
        grad_ptr = address.to(tl.pointer_type(DTYPE))
        if ALIGNED:
            grad_ptr = tl.multiple_of(grad_ptr, 16)
            numel = tl.multiple_of(numel, 16)
        offsets = index.to(tl.int64) * _CHUNK + tl.arange(0, _CHUNK)
        grad = tl.load(grad_ptr + offsets, mask=offsets < numel, other=0.0).to(tl.float32)
        total = tl.sum(grad * grad, axis=0)
    tl.store(partial_ptr + chunk, total)


@triton.jit
def finish_kernel(
    partial_ptr,
    num_partials,
    loss_ptr,  # fp32 scalar, or None
    max_norm,
    address_ptr,
    table_ptr,
    hyper_ptr,  # fp64 [num_groups, 5], the order of Hyperparameters
    step_ptr,
    row_ptr,  # fp32 [num_params, ROW]
    norm_ptr,
    scale_ptr,
    num_params,
    LION: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The norm, what to multiply gradients by, the steps counted on, and each parameter's row; one program."""
    sums = tl.full([4 * BLOCK], 0.0, tl.float64)
    start = 0
    while start < num_partials:  # Triton's interpreter takes no range over an argument
        at = start + tl.arange(0, 4 * BLOCK)
        sums += tl.load(partial_ptr + at, mask=at < num_partials, other=0.0).to(tl.float64)
        start += 4 * BLOCK
    norm = tl.sqrt(tl.sum(sums, axis=0)).to(tl.float32)
    counted = tl.where(norm < float("inf"), 1.0, 0.0)  # 0 for NaN too
    if loss_ptr is not None:
        counted = tl.where(tl.abs(tl.load(loss_ptr)) < float("inf"), counted, 0.0)
    tl.store(norm_ptr, norm)
    tl.store(scale_ptr, tl.where(counted > 0.0, tl.minimum(max_norm / (norm + 1e-6), 1.0), -1.0))

    start = 0
    while start < num_params:
        at = start + tl.arange(0, BLOCK)
        mask = at < num_params
        address = tl.load(address_ptr + at, mask=mask, other=0)
        step = tl.load(step_ptr + at, mask=mask, other=0.0) + tl.where(address != 0, counted, 0.0)
        tl.store(step_ptr + at, step, mask=mask)
        hyper = hyper_ptr + tl.load(table_ptr + at * 2 + 1, mask=mask, other=0) * 5
        lr = tl.load(hyper)
        beta1 = tl.load(hyper + 1)
        beta2 = tl.load(hyper + 2)
        eps = tl.load(hyper + 3)
        weight_decay = tl.load(hyper + 4)
        # In fp64: 1 - 0.999 in fp32 is wrong by a part in 20,000.
        time = step.to(tl.float64)
        correction1 = 1.0 - tl.exp(time * tl.log(beta1))
        correction2 = tl.sqrt(1.0 - tl.exp(time * tl.log(beta2)))
        row = row_ptr + at * _ROW
        if LION:
            correction1 = 1.0
        tl.store(row, (lr / correction1).to(tl.float32), mask=mask)
        tl.store(row + 1, (1.0 / correction2).to(tl.float32), mask=mask)
        tl.store(row + 2, (lr * weight_decay).to(tl.float32), mask=mask)
        tl.store(row + 3, beta1.to(tl.float32), mask=mask)
        tl.store(row + 4, (1.0 - beta1).to(tl.float32), mask=mask)
        tl.store(row + 5, beta2.to(tl.float32), mask=mask)
        tl.store(row + 6, (1.0 - beta2).to(tl.float32), mask=mask)
        tl.store(row + 7, eps.to(tl.float32), mask=mask)
        start += BLOCK


@triton.jit
def nearest_code(values, threshold_ptr, SIGNED: tl.constexpr):
    """Number of thresholds below each of the values of [-1, 1]: the code of the nearest point; in int32, modulo 256.

    Thresholds lie evenly within a decade, but for those between two decades, so that a threshold's place in the table
    is nearly linear in it, more steeply the lower the decade: over all decades, the least of seven lines. They miss a
    threshold's place by at most 0.25, so that only the threshold whose place is nearest needs a look in the table.

    That leaves room for the errors of fp16, in which a GPU computes two places at a time; as 64ths, so that the
    steepest line's slope is a number of fp16.
    """
    LEVELS: tl.constexpr = 64 if SIGNED else 128  # points in the highest decade
    half = values.to(tl.float16)
    magnitude = tl.abs(half)
    origin: tl.constexpr = 0.5 * SIGNED - LEVELS / 64
    place = magnitude * (LEVELS / 0.9 / 64) + (LEVELS * 8 / 9 + origin) / 64
    for decade in tl.static_range(1, 7):
        line = magnitude * (LEVELS * 5**decade / 0.9 / 64) + (LEVELS / 2**decade * 8 / 9 + origin) / 64
        place = tl.minimum(place, line)
    if SIGNED:
        # Thresholds from 127 upwards are those above 0, from 126 downwards the same below it.
        sign = half.to(tl.int16, bitcast=True) & -0x8000
        place = (place.to(tl.int16, bitcast=True) | sign).to(tl.float16, bitcast=True) + 126.5 / 64
    # From 16 to 32 the numbers of fp16 are 64ths: this rounds, and the last bits are the integer.
    nearest = ((place + 24.0).to(tl.int16, bitcast=True) & 0xFF).to(tl.int32)
    # For -1 the place is -1: of 255, which holds -inf, so that 256 comes out, and that is 0.
    return nearest + (values > tl.load(threshold_ptr + nearest)).to(tl.int32)


@triton.jit
def _load_moment(code_ptr, absmax_ptr, map_ptr, offsets, mask, blocks, some, ZERO: tl.constexpr):
    codes = tl.load(code_ptr + offsets, mask=mask, other=ZERO).to(tl.int32)
    absmax = tl.load(absmax_ptr + blocks, mask=some, other=0.0)
    return tl.load(map_ptr + codes) * absmax[None, :, None]


@triton.jit
def _store_moment(moment, code_ptr, absmax_ptr, threshold_ptr, offsets, mask, blocks, some, SIGNED: tl.constexpr):
    absmax = tl.max(tl.max(tl.abs(moment), axis=2), axis=0)
    inverse = tl.where(absmax >= _SMALLEST_ABSMAX, tl.div_rn(1.0, absmax), 0.0)
    codes = nearest_code(moment * inverse[None, :, None], threshold_ptr, SIGNED)
    tl.store(code_ptr + offsets, codes.to(tl.uint8), mask=mask)
    tl.store(absmax_ptr + blocks, absmax, mask=some)


@triton.jit(do_not_specialize=["first_chunk", "num_params"])
def update_kernel(
    address_ptr,
    num_params,
    table_ptr,
    chunk_tensor_ptr,
    chunk_index_ptr,
    chunk_offset_ptr,
    first_chunk,
    row_ptr,
    scale_ptr,
    first_ptr,  # fp32 or uint8, the first moment
    second_ptr,
    absmax1_ptr,
    absmax2_ptr,
    map1_ptr,
    map2_ptr,
    threshold1_ptr,
    threshold2_ptr,
    DTYPE: tl.constexpr,
    LION: tl.constexpr,
    BITS: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """AdamW or Lion on one chunk of a parameter. Lion has no second moment: what belongs to it is None."""
    chunk = first_chunk + tl.program_id(0)
    tensor = tl.load(chunk_tensor_ptr + chunk)
    index = tl.load(chunk_index_ptr + chunk)
    # All that the tensors' addresses need is asked for at once: what waits for it, waits once.
    grad_address = tl.load(address_ptr + tensor)
    param_address = tl.load(address_ptr + num_params + tensor)
    numel = tl.load(table_ptr + tensor * 2)
    # All is said to begin at multiples of 4 elements, though it be of more: a thread then takes 4 elements next to each
    # other of every tensor. Were it 16, as for codes of 1 byte it would be, then gradients and parameters would be read
    # in steps and go through shared memory.
    begin = tl.multiple_of(tl.load(chunk_offset_ptr + chunk), 4)
    scale = tl.load(scale_ptr)
    if (grad_address != 0) & (scale >= 0.0):
        start = index.to(tl.int64) * _CHUNK
        left = tl.minimum(numel - start, _CHUNK).to(tl.int32)
        grad_ptr = grad_address.to(tl.pointer_type(DTYPE))
        param_ptr = param_address.to(tl.pointer_type(DTYPE))
        if ALIGNED:
            grad_ptr = tl.multiple_of(grad_ptr, 4 * DTYPE.primitive_bitwidth // 8)
            param_ptr = tl.multiple_of(param_ptr, 4 * DTYPE.primitive_bitwidth // 8)
            left = tl.multiple_of(left, 4)
        grad_ptr += start
        param_ptr += start
        first_ptr += begin
        if not LION:
            second_ptr += begin
        row = row_ptr + tensor * _ROW
        step_size = tl.load(row)
        inverse_correction2 = tl.load(row + 1)
        decay = tl.load(row + 2)
        beta1 = tl.load(row + 3)
        one_minus_beta1 = tl.load(row + 4)
        beta2 = tl.load(row + 5)
        one_minus_beta2 = tl.load(row + 6)
        eps = tl.load(row + 7)

        # [half a block, blocks, halves]: a warp has whole blocks, both halves in registers, and finds their scales by
        # itself. The elements come first because Triton lays the tables' look-ups out so, whatever the other loads.
        rows = tl.arange(0, _ROWS)
        halves = tl.arange(0, 2)[None, None, :] * _HALF
        offsets = tl.arange(0, _HALF)[:, None, None] + rows[None, :, None] * _COLUMNS + halves
        mask = offsets < left
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0).to(tl.float32) * scale
        param = tl.load(param_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        # What is taken away, and not what is left: 1 - lr * weight_decay in fp32 is wrong to one side, at every step.
        param -= param * decay
        if BITS == 8:
            some = rows * _COLUMNS < left
            absmax1_ptr += begin // _COLUMNS
            first = _load_moment(first_ptr, absmax1_ptr, map1_ptr, offsets, mask, rows, some, 127)
            if not LION:
                absmax2_ptr += begin // _COLUMNS
                second = _load_moment(second_ptr, absmax2_ptr, map2_ptr, offsets, mask, rows, some, 0)
        else:
            first = tl.load(first_ptr + offsets, mask=mask, other=0.0)
            if not LION:
                second = tl.load(second_ptr + offsets, mask=mask, other=0.0)

        if LION:
            direction = first * beta1 + grad * one_minus_beta1
            param -= tl.where(direction > 0, step_size, tl.where(direction < 0, -step_size, 0.0))
            first = first * beta2 + grad * one_minus_beta2
        else:
            first = first * beta1 + grad * one_minus_beta1
            second = second * beta2 + grad * grad * one_minus_beta2
            param -= step_size * (first / (tl.sqrt(second) * inverse_correction2 + eps))
        tl.store(param_ptr + offsets, param.to(DTYPE), mask=mask)
        if BITS == 8:
            _store_moment(first, first_ptr, absmax1_ptr, threshold1_ptr, offsets, mask, rows, some, True)
            if not LION:
                _store_moment(second, second_ptr, absmax2_ptr, threshold2_ptr, offsets, mask, rows, some, False)
        else:
            tl.store(first_ptr + offsets, first, mask=mask)
            if not LION:
                tl.store(second_ptr + offsets, second, mask=mask)


def update_warps(bits: int, aligned: bool) -> int:
    """Warps of an update. Loads of single bytes need more registers."""
    return NUM_WARPS if bits == 32 or aligned else 2 * NUM_WARPS


_DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def optimizer_step_triton(
    state: OptimizerState,
    grads: Sequence[Tensor | None],
    groups: Sequence[Hyperparameters],
    max_grad_norm: float | None,
    loss: Tensor | None,
    group: distributed.ProcessGroup | None = None,
) -> None:
    """See `fourfold.kernels.optimizer.optimizer_step`."""
    device = state.steps.device
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            _step(state, grads, groups, max_grad_norm, loss, group)
    else:
        _step(state, grads, groups, max_grad_norm, loss, group)


def _step(
    state: OptimizerState,
    grads: Sequence[Tensor | None],
    groups: Sequence[Hyperparameters],
    max_grad_norm: float | None,
    loss: Tensor | None,
    group: distributed.ProcessGroup | None,
) -> None:
    device, num_params, num_chunks = state.steps.device, len(state.params), state.chunk_tensor.numel()
    pointers = [0 if grad is None else grad.data_ptr() for grad in grads]
    pointers += [param.data_ptr() for param in state.params]
    aligned = all(pointer % 16 == 0 for pointer in pointers) and all(p.numel() % 16 == 0 for p in state.params)
    lion = state.rule == "lion"
    addresses, hyper = _send(pointers, groups, device)
    partials = torch.empty(num_chunks, dtype=torch.float32, device=device)
    rows = torch.empty(num_params * ROW, dtype=torch.float32, device=device)

    for pack in state.packs:
        norm_kernel[(pack.num_chunks,)](
            addresses,
            state.table,
            state.chunk_tensor,
            state.chunk_index,
            partials,
            pack.first_chunk,
            DTYPE=_DTYPES[pack.dtype],
            ALIGNED=aligned,
            num_warps=NUM_WARPS,
        )
    if group is not None:
        partials = sum_over(group, partials.sum(dtype=torch.float64).float().view(1))
    finish_kernel[(1,)](
        partials,
        partials.numel(),
        loss,
        float(max_grad_norm or math.inf),
        addresses,
        state.table,
        hyper,
        state.steps,
        rows,
        state.norm,
        state.scale,
        num_params,
        LION=lion,
        BLOCK=FINISH_BLOCK,
        num_warps=FINISH_WARPS,
    )

    def update(pack: Pack, first_chunk: int, chunks: int, values: Sequence[Tensor], absmax: Sequence[Tensor]) -> None:
        """Of chunks whose moments, and scales of moments of 8 bits, are in `values` and `absmax`."""
        update_kernel[(chunks,)](
            addresses,
            num_params,
            state.table,
            state.chunk_tensor,
            state.chunk_index,
            state.chunk_offset,
            first_chunk,
            rows,
            state.scale,
            *_two(values),
            *_two(absmax),
            *state.maps,
            *state.thresholds,
            DTYPE=_DTYPES[pack.dtype],
            LION=lion,
            BITS=pack.kind.bits,
            ALIGNED=aligned,
            num_warps=update_warps(pack.kind.bits, aligned),
        )

    for pack in state.packs:
        if state.pager is None or not pack.pages:  # resident
            update(pack, pack.first_chunk, pack.num_chunks, *state.moments[pack.kind])
            continue
        for page, parts in state.pager.turn(pack.pages):
            many = len(MOMENTS[state.rule])
            update(pack, page.first_chunk, page.num_chunks, parts[:many], parts[many:])


def _two(tensors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """What a kernel takes for its first and second moment."""
    return (*tensors, None, None)[:2]


def _send(pointers: list[int], groups: Sequence[Hyperparameters], device: torch.device) -> tuple[Tensor, Tensor]:
    """Addresses, int64, and hyperparameters, fp64, on the device, by one copy that nothing waits for.

    The pinned memory is new each step: its allocator gives none out again before the copy from it has been made.
    """
    numbers = [number for group in groups for number in group]
    staged = torch.empty(len(pointers) + len(numbers), dtype=torch.int64, pin_memory=device.type == "cuda")
    staged[: len(pointers)] = torch.tensor(pointers, dtype=torch.int64)
    staged[len(pointers) :].view(torch.float64)[:] = torch.tensor(numbers, dtype=torch.float64)
    sent = staged.to(device, non_blocking=True)
    return sent[: len(pointers)], sent[len(pointers) :].view(torch.float64)
