"""The backward pass of a fused block; what the forward pass did not keep is computed again. See block_forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fourfold.kernels.low_rank import new_extended
from fourfold.kernels.norm import add_rms_norm_, rms_norm, rms_norm_backward
from fourfold.kernels.rotary import rotary_backward
from fourfold.kernels.swiglu import split_activation_sums, swiglu_backward_, swiglu_backward_sums_
from fourfold.models.attention import AttentionState, attention_backward
from fourfold.models.block_forward import attend, attention_output, fill_low
from fourfold.models.block_state import Block, Saved, columns, parts
from fourfold.models.linear_group import ExtendedWeight, LowRankSums

__all__ = ["block_backward"]


@dataclass
class _Normed:
    """What the sums of a group behind a norm are made of, beside the norm's input. The norm's output is not among it,
    so that none is made again where nothing else needs it.

    Attributes:
        rstd: The reciprocal root mean squares of the input.
        low: The norm's output times A^T, [tokens, rank].
    """

    rstd: Tensor
    low: Tensor


@dataclass
class _AttentionHalf:
    """The first half of a block, as its backward pass needs it."""

    weight: ExtendedWeight
    normed: _Normed
    qkv: Tensor
    rotated: Tensor
    attention: Tensor
    state: AttentionState


def block_backward(
    grad_x: Tensor, saved: Saved, block: Block, *, needs_x: bool, out: Tensor | None = None
) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of the block's input, if it needs one, and of its adapters.

    Works in the memory of what was saved, and forgets it as it goes.

    Args:
        grad_x: [tokens, hidden + rank of down]: the gradient of the block's output, and room, which is written to.
        out: Where the gradient of the input goes, [tokens, hidden] at least; this may be `grad_x`. None: to a new
            tensor, with room for a block like this one.

    Returns:
        The gradient of the input, [tokens, hidden] and room.
    """
    x, mid, half = saved.x, saved.mid, None
    saved.mid = None
    assert x is not None
    if mid is None or saved.attention is None:
        # Only the attention leads to the MLP's input. Where both were kept, this half waits until the MLP's wide
        # tensors are gone.
        half = _attention_half(x, saved, block)
    weight = residual = None
    if mid is None:
        assert half is not None
        weight = block.out.expand(x)
        mid, residual = attention_output(half.attention, weight)[0], x
    grad_normed, rstd2, mlp_grads = _mlp_backward(grad_x, mid, residual, saved, block)
    weight = weight or block.out.expand(x)
    grad = grad_x[:, : x.shape[1]]
    grad_mid_x = new_extended(x, len(x), weight.rows, block.out.rank)
    grad_mid, grad_low = columns(grad_mid_x, weight.rows)
    rms_norm_backward(grad_normed, mid, block.norm2, rstd2, grad, out=grad_mid)
    del grad_normed, mid, grad, grad_x
    half = half or _attention_half(x, saved, block)
    out_sums = LowRankSums(block.out)
    out_sums.pair(grad_mid_x, weight, saved.low_out)
    if block.out.rank:
        out_sums.add_a(half.attention, grad_low)
    grad_qkv_x = _attention_backward(grad_mid_x @ weight.backward, half, block)
    del weight
    qkv_sums = LowRankSums(block.qkv, block.norm1)
    if block.qkv.rank:
        qkv_sums.pair(grad_qkv_x, half.weight, half.normed.low)
        qkv_sums.add_a(x, columns(grad_qkv_x, half.weight.rows)[1], half.normed.rstd)
    grads = [*qkv_sums.gradients(), *out_sums.gradients(), *mlp_grads]
    if not needs_x:
        return None, grads
    grad_normed = grad_qkv_x @ half.weight.backward
    if out is None:
        out = new_extended(x, len(x), x.shape[1], block.down.rank)
    rms_norm_backward(grad_normed, x, block.norm1, half.normed.rstd, grad_mid, out=out[:, : x.shape[1]])
    return out, grads


def _attention_half(x: Tensor, saved: Saved, block: Block) -> _AttentionHalf:
    """Out of what was kept; the rest is computed again."""
    weight = block.qkv.expand(x)
    if saved.qkv is not None and saved.low_qkv is not None and saved.rstd1 is not None:
        normed = _Normed(saved.rstd1, saved.low_qkv)
        qkv = saved.qkv
        rotated = qkv if block.q_norm is None else block.rotate(qkv, block.qkv.bias(x.dtype))
    else:
        normed_x, rstd = rms_norm(x, block.norm1, block.norm_eps, block.qkv.rank)
        normed = _Normed(rstd, fill_low(normed_x, weight))
        if saved.attention is None:
            return _AttentionHalf(weight, normed, *attend(normed_x, weight, block))
        qkv = normed_x @ weight.forward.T
        rotated = block.rotate(qkv, block.qkv.bias(x.dtype))
    attention, state = saved.attention, saved.state
    if attention is None or state is None:
        raise ValueError("a policy that keeps qkv keeps the attention, too")
    return _AttentionHalf(weight, normed, qkv, rotated, attention, state)


def _attention_backward(grad: Tensor, half: _AttentionHalf, block: Block) -> Tensor:
    """Gradient of qkv, and room for its low-rank columns, for `grad` [tokens, features] of the attention's output."""
    by_head = (block.batch, block.seq, block.num_heads, -1)
    dq, dk, dv = attention_backward(
        grad.view(by_head),
        *block.split_heads(half.rotated),
        half.attention.view(by_head),
        half.state,
        scale=block.scale,
        documents=block.documents,
        window=block.window,
    )
    return rotary_backward(
        dq.view(len(grad), -1),
        dk.view(len(grad), -1),
        dv.view(len(grad), -1),
        None if block.q_norm is None else half.qkv,
        block.cos,
        block.sin,
        block.num_heads,
        block.num_kv_heads,
        block.qkv.bias(grad.dtype),
        block.q_norm,
        block.k_norm,
        block.head_eps,
        block.qkv.rank,
    )


def _mlp_backward(
    grad_x: Tensor, mid: Tensor, residual: Tensor | None, saved: Saved, block: Block
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """(gradient of the normed input of the MLP, its norm's 1/rms, gradients of the adapters).

    `residual` is added to `mid`, in place.
    """
    gate_up = block.gate_up.expand(mid)
    down = block.down.expand(mid)
    sums = _MlpSums(block)
    sums.down.pair(grad_x, down, saved.low_down)
    kept, saved.gate_up_x = saved.gate_up_x, None
    normed_x = mid
    if kept is not None and saved.low_gate_up is not None and saved.rstd2 is not None:
        normed = _Normed(saved.rstd2, saved.low_gate_up)
    else:
        arguments = (mid, block.norm2, block.norm_eps, block.gate_up.rank)
        normed_x, rstd = rms_norm(*arguments) if residual is None else add_rms_norm_(residual, *arguments)
        normed = _Normed(rstd, fill_low(normed_x, gate_up))
    grad_normed = torch.empty_like(mid)
    for part in parts(len(mid), whole=kept is not None, offload=block.policy.offload):
        gate_up_x = kept
        if gate_up_x is None:
            gate_up_x = new_extended(mid, part.stop - part.start, gate_up.rows, block.gate_up.rank)
            torch.mm(normed_x[part], gate_up.forward.T, out=gate_up_x[:, : gate_up.rows])
        grad_act = grad_x[part] @ down.backward
        sums.activate(gate_up_x, grad_act, gate_up.up, normed.low[part], columns(grad_x[part], down.rows)[1])
        del grad_act
        if block.gate_up.rank:
            sums.gate_up.add_a(mid[part], columns(gate_up_x, gate_up.rows)[1], normed.rstd[part])
        torch.mm(gate_up_x, gate_up.backward, out=grad_normed[part])
        # Gone before the next part allocates its own.
        del gate_up_x
    return grad_normed, normed.rstd, sums.gradients()


class _MlpSums:
    """The sums of gate and up and of down. What the activation's backward pass holds is added up by it."""

    def __init__(self, block: Block) -> None:
        self.gate_up = LowRankSums(block.gate_up, block.norm2)
        self.down = LowRankSums(block.down)
        self.activation = block.activation
        gate, up = (linear.rank for linear in block.gate_up.linears)
        wants_gate, wants_up = self.gate_up.wants_b
        # Of the low-rank columns of gate and up, those that sums are taken with.
        self._columns = slice(0 if wants_gate else gate, gate + up if wants_up else gate)
        self._ranks = (
            gate if wants_gate else 0,
            up if wants_up else 0,
            block.down.used_ranks if self.down.wants_a else 0,
        )
        self._width = block.down.in_features
        # What is not wanted is not summed: the sums are gradients, all of them, unless a layer has two adapters.
        self.gate_up.b_are_gradients = self.gate_up.wants_single_b
        self._sums: Tensor | None = None

    def activate(
        self, gate_up_x: Tensor, grad_act: Tensor, projection: Tensor | None, low: Tensor, grad_low: Tensor
    ) -> None:
        """The backward pass of the activation for a part, in place; see `swiglu_backward_sums_`.

        Args:
            low: The input of gate and up times A^T, [tokens, rank].
            grad_low: The gradient of down's output times its sB, [tokens, rank].
        """
        if not any(self._ranks):
            swiglu_backward_(gate_up_x, grad_act, projection, self.activation)
            return
        gate, up, down = self._ranks
        own = low[:, self._columns] if gate + up else None
        own_grad = grad_low[:, :down] if down else None
        scalings = self.gate_up.scalings if self.gate_up.b_are_gradients else (1.0, 1.0)
        self._sums = swiglu_backward_sums_(
            gate_up_x, grad_act, own, gate, own_grad, projection, self.activation, scalings, out=self._sums
        )

    def gradients(self) -> list[Tensor | None]:
        """Of the parameters of gate and up, then of down."""
        if self._sums is not None:
            *self.gate_up.b, sums_down = split_activation_sums(self._sums, self._width, *self._ranks)
            # Where those of gate and up are no gradients, a gradient that is a view would keep them alive.
            self.down.a = sums_down if self.gate_up.b_are_gradients else sums_down.clone()
        return [*self.gate_up.gradients(), *self.down.gradients()]
