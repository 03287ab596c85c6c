"""The gated activation of a feed-forward layer (GLU variants, https://arxiv.org/abs/2002.05202), both ways.

    y = round(activation(gate)) * up

rounded between, as Transformers' LlamaMLP computes it. The backward pass works in place: it leaves y where the
gradient of y stood and the gradients of gate and up where these stood, so that it needs no memory of its own. Where
the sums over tokens of these three are wanted, times a few low-rank columns each, a kernel takes them while it holds
what they are made of; then y is not written at all.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from fourfold.kernels.availability import say_once
from fourfold.kernels.low_rank import columns_refuse, extend, fill_columns, low_rank_grad, new_extended, working_dtype

__all__ = [
    "ACTIVATIONS",
    "split_activation_sums",
    "swiglu",
    "swiglu_backward_",
    "swiglu_backward_reference_",
    "swiglu_backward_sums_",
    "swiglu_backward_sums_reference_",
    "swiglu_reference",
]

logger = logging.getLogger(__name__)

ACTIVATIONS = ("silu", "gelu_tanh")

torch.library.define(
    "fourfold::swiglu",
    '(Tensor gate_up, Tensor? projection=None, str activation="silu") -> Tensor',
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fourfold::swiglu_backward_",
    '(Tensor(a!) gate_up_ext, Tensor(b!) grad, Tensor? projection=None, str activation="silu") -> ()',
    tags=torch.Tag.pt2_compliant_tag,
)
torch.library.define(
    "fourfold::swiglu_backward_sums_",
    "(Tensor(a!) gate_up_ext, Tensor(b!) grad, Tensor? low, int gate_rank, Tensor? grad_low, Tensor(c!) sums,"
    " bool add, Tensor? projection, str activation, float[] scalings) -> ()",
    tags=torch.Tag.pt2_compliant_tag,
)
_forward_op = torch.ops.fourfold.swiglu.default
_backward_op = torch.ops.fourfold.swiglu_backward_.default
_sums_op = torch.ops.fourfold.swiglu_backward_sums_.default

# What the kernels with products take: beyond it, registers run short. fp32 has no tensor cores of its precision.
_MAX_RANK = 64
_PRODUCT_DTYPES = (torch.bfloat16, torch.float16)


def swiglu(gate_up: Tensor, projection: Tensor | None = None, activation: str = "silu") -> Tensor:
    """The gated activation.

    Args:
        gate_up: [M, 2I], gate columns first; bf16, fp16 or fp32; last stride 1.
        projection: [R, I] of gate_up's dtype, any strides; None stands for R = 0.
        activation: One of ACTIVATIONS; gelu_tanh is GELU's approximation by tanh.

    Returns:
        [M, I + R] of gate_up's dtype, last stride 1: y, then `y @ projection.T`, accumulated in fp32.
    """
    return cast(Tensor, _forward_op(gate_up, projection, activation))


def _activate(gate: Tensor, activation: str) -> Tensor:
    if activation == "silu":
        return F.silu(gate)
    if activation == "gelu_tanh":
        return F.gelu(gate, approximate="tanh")
    raise ValueError(f"activation is {activation!r}; allowed: {', '.join(ACTIVATIONS)}")


def _activate_gradient(gate: Tensor, activation: str) -> Tensor:
    """The derivative of the activation at `gate`."""
    if activation == "silu":
        sigmoid = torch.sigmoid(gate)
        return sigmoid * (1 + gate * (1 - sigmoid))
    scale = math.sqrt(2 / math.pi)
    tanh = torch.tanh(scale * (gate + 0.044715 * gate**3))
    return 0.5 * (1 + tanh) + 0.5 * gate * (1 - tanh**2) * scale * (1 + 3 * 0.044715 * gate**2)


def swiglu_reference(gate_up: Tensor, projection: Tensor | None = None, activation: str = "silu") -> Tensor:
    """`swiglu` in PyTorch."""
    gate, up = gate_up.chunk(2, dim=1)
    activated = _activate(gate.to(working_dtype(gate.dtype)), activation).to(gate.dtype)
    return extend(activated * up, projection)


def swiglu_backward_(
    gate_up_ext: Tensor,
    grad: Tensor,
    projection: Tensor | None = None,
    activation: str = "silu",
) -> None:
    """Gradients of gate and up, and y once more, written over the inputs.

    With dy what `grad` holds; the arithmetic is in fp32 and every result is rounded once:

        grad                  <- y = round(activation(gate)) * up
        gate_up_ext[:, :I]    <- dgate = dy * up * activation'(gate)
        gate_up_ext[:, I:2I]  <- dup = dy * round(activation(gate))
        gate_up_ext[:, 2I:]   <- [dgate dup] @ projection.T

    Args:
        gate_up_ext: [M, 2I + R], gate columns first, then room for R columns; last stride 1.
        grad: [M, I], the gradient of y; last stride 1.
        projection: [R, 2I], any strides, or None for R = 0.
        activation: One of ACTIVATIONS.
    """
    _backward_op(gate_up_ext, grad, projection, activation)


def swiglu_backward_reference_(
    gate_up_ext: Tensor,
    grad: Tensor,
    projection: Tensor | None = None,
    activation: str = "silu",
) -> None:
    """`swiglu_backward_` in PyTorch."""
    width = grad.shape[1]
    dtype = working_dtype(grad.dtype)
    gate, up = gate_up_ext[:, :width].to(dtype), gate_up_ext[:, width : 2 * width].to(dtype)
    grad_y = grad.to(dtype)
    activated = _activate(gate, activation).to(grad.dtype).to(dtype)
    # All are computed before any is written: without a cast, gate, up and grad_y are views of what is overwritten.
    results = (activated * up, grad_y * up * _activate_gradient(gate, activation), grad_y * activated)
    for target, result in zip((grad, *gate_up_ext[:, : 2 * width].chunk(2, dim=1)), results, strict=True):
        target.copy_(result)
    fill_columns(gate_up_ext, 2 * width, projection)


def swiglu_backward_sums_(
    gate_up_ext: Tensor,
    grad: Tensor,
    low: Tensor | None,
    gate_rank: int,
    grad_low: Tensor | None,
    projection: Tensor | None = None,
    activation: str = "silu",
    scalings: Sequence[float] = (1.0, 1.0),
    out: Tensor | None = None,
) -> Tensor:
    """`swiglu_backward_`, and sums over the tokens of what it computes: the gradients of LoRA matrices.

    The products are those of the rounded results, accumulated in fp32:

        dgate.T @ low[:, :gate_rank] * scalings[0]    [I, gate_rank]
        dup.T @ low[:, gate_rank:] * scalings[1]      [I, R1 - gate_rank]
        grad_low.T @ y                                [R2, I]

    Args:
        gate_up_ext: [M, 2I + R], as in `swiglu_backward_`, and left like there.
        grad: [M, I], the gradient of y; last stride 1. What it holds afterwards is undefined.
        low: [M, R1], the input of gate and up times their A^T, last stride 1; None for R1 = 0.
        gate_rank: How many columns of `low` are gate's; the others are up's.
        grad_low: [M, R2], the gradient of down's output times its sB, likewise.
        projection: [R, 2I], any strides, or None for R = 0.
        activation: One of ACTIVATIONS.
        scalings: Of gate's adapter, and up's.
        out: What this returned for other tokens: the sums are added to it in place.

    Returns:
        fp32 [(R1 + R2) * I] (float64 for float64 inputs), one sum after the other, each contiguous; see
        `split_activation_sums`. It is `out` where that is given.
    """
    sums = out
    if sums is None:
        rank = sum(columns.shape[1] for columns in (low, grad_low) if columns is not None)
        sums = grad.new_empty(rank * grad.shape[1], dtype=working_dtype(grad.dtype))
    _sums_op(gate_up_ext, grad, low, gate_rank, grad_low, sums, out is not None, projection, activation, scalings)
    return sums


def split_activation_sums(sums: Tensor, width: int, gate: int, up: int, down: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views [width, gate], [width, up] and [down, width] of what `swiglu_backward_sums_` returned for these ranks."""
    of_gate, of_up, of_down = sums.split([gate * width, up * width, down * width])
    return of_gate.view(width, gate), of_up.view(width, up), of_down.view(down, width)


def swiglu_backward_sums_reference_(
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
) -> None:
    """What `swiglu_backward_sums_` writes to `sums`, or adds to them, out of the results of `swiglu_backward_`."""
    swiglu_backward_(gate_up_ext, grad, projection, activation)
    width = grad.shape[1]
    up_rank = 0 if low is None else low.shape[1] - gate_rank
    down_rank = 0 if grad_low is None else grad_low.shape[1]
    gate_sums, up_sums, down_sums = split_activation_sums(sums, width, gate_rank, up_rank, down_rank)
    if not add:
        sums.zero_()
    if low is not None:
        for own, grad_own, own_low, scaling in (
            (gate_sums, gate_up_ext[:, :width], low[:, :gate_rank], scalings[0]),
            (up_sums, gate_up_ext[:, width : 2 * width], low[:, gate_rank:], scalings[1]),
        ):
            own.add_(low_rank_grad(grad_own, own_low), alpha=scaling)
    if grad_low is not None:
        low_rank_grad(grad_low, grad, down_sums)


def _refusal(activation: str, *tensors: Tensor | None) -> str | None:
    # One that is not in the table is refused by the reference, with an error.
    return columns_refuse(*tensors) if activation in ACTIVATIONS else f"no kernel knows {activation!r}"


def _has_products(x: Tensor, *ranks: int) -> bool:
    return x.dtype in _PRODUCT_DTYPES and 0 < max(ranks) <= _MAX_RANK


def _forward_cuda(gate_up: Tensor, projection: Tensor | None = None, activation: str = "silu") -> Tensor:
    refusal = _refusal(activation, gate_up)
    if refusal is not None:
        say_once(logger, f"the gated activation runs in PyTorch, slower than by its kernel: {refusal}")
        return swiglu_reference(gate_up, projection, activation)
    if projection is not None and projection.stride(1) == 1 and _has_products(gate_up, projection.shape[0]):
        from fourfold.kernels import swiglu_low_rank_triton

        return swiglu_low_rank_triton.swiglu_product(gate_up, projection, activation)
    from fourfold.kernels import swiglu_triton

    return swiglu_triton.swiglu(gate_up, projection, activation)


def _backward_cuda(
    gate_up_ext: Tensor,
    grad: Tensor,
    projection: Tensor | None = None,
    activation: str = "silu",
) -> None:
    refusal = _refusal(activation, gate_up_ext, grad)
    if refusal is not None:
        say_once(logger, f"the gated activation's gradient runs in PyTorch, slower than by its kernel: {refusal}")
        swiglu_backward_reference_(gate_up_ext, grad, projection, activation)
        return
    from fourfold.kernels import swiglu_triton

    swiglu_triton.swiglu_backward_(gate_up_ext, grad, projection, activation)


def _sums_cuda(
    gate_up_ext: Tensor,
    grad: Tensor,
    low: Tensor | None,
    gate_rank: int,
    grad_low: Tensor | None,
    sums: Tensor,
    add: bool,
    projection: Tensor | None,
    activation: str,
    scalings: Sequence[float],
) -> None:
    arguments = (gate_up_ext, grad, low, gate_rank, grad_low, sums, add, projection, activation, scalings)
    ranks = (
        0 if low is None else max(gate_rank, low.shape[1] - gate_rank),
        0 if grad_low is None else grad_low.shape[1],
    )
    if not _has_products(grad, *ranks):
        swiglu_backward_sums_reference_(*arguments)
        return
    refusal = _refusal(activation, gate_up_ext, grad, low, grad_low)
    if refusal is not None:
        say_once(logger, f"the gated activation's sums are products of their own, which is slower: {refusal}")
        swiglu_backward_sums_reference_(*arguments)
        return
    from fourfold.kernels import swiglu_low_rank_triton

    swiglu_low_rank_triton.swiglu_backward_sums_(*arguments)


def _forward_fake(gate_up: Tensor, projection: Tensor | None = None, _activation: str = "silu") -> Tensor:
    rank = 0 if projection is None else projection.shape[0]
    return new_extended(gate_up, gate_up.shape[0], gate_up.shape[1] // 2, rank)


def _backward_fake(
    _gate_up_ext: Tensor,
    _grad: Tensor,
    _projection: Tensor | None = None,
    _activation: str = "silu",
) -> None:
    return None


def _sums_fake(
    _gate_up_ext: Tensor,
    _grad: Tensor,
    _low: Tensor | None,
    _gate_rank: int,
    _grad_low: Tensor | None,
    _sums: Tensor,
    _add: bool,
    _projection: Tensor | None,
    _activation: str,
    _scalings: Sequence[float],
) -> None:
    return None


torch.library.impl("fourfold::swiglu", "default", swiglu_reference)
torch.library.impl("fourfold::swiglu_backward_", "default", swiglu_backward_reference_)
torch.library.impl("fourfold::swiglu_backward_sums_", "default", swiglu_backward_sums_reference_)
torch.library.impl("fourfold::swiglu", "cuda", _forward_cuda)
torch.library.impl("fourfold::swiglu_backward_", "cuda", _backward_cuda)
torch.library.impl("fourfold::swiglu_backward_sums_", "cuda", _sums_cuda)
torch.library.register_fake("fourfold::swiglu", _forward_fake)
torch.library.register_fake("fourfold::swiglu_backward_", _backward_fake)
torch.library.register_fake("fourfold::swiglu_backward_sums_", _sums_fake)
