"""A pre-norm decoder block with gated MLP over 4-bit weights and their adapters: one forward, one backward function.

    normed = norm1(x);  qkv = rotate(normed Wqkv^T);  attention = softmax(q k^T) v;  mid = x + attention Wo^T
    normed2 = norm2(mid);  gate_up = normed2 Wgu^T;  out = mid + (act(gate) * up) Wdown^T

every W with its adapter (see linear_group). Activations are [tokens, features]; a name that ends in `_x` has the
group's low-rank columns beside it. A weight is dequantized once in each pass: what a backward pass computes again
shares it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fourfold.kernels.low_rank import extend
from fourfold.kernels.norm import rms_norm, rms_norm_backward
from fourfold.kernels.rotary import rotary, rotary_, rotary_backward
from fourfold.kernels.swiglu import swiglu, swiglu_backward_
from fourfold.models.attention import AttentionState, Documents, attention_backward, attention_forward
from fourfold.models.linear_group import ExtendedWeight, LinearGroup, LowRankSums
from fourfold.models.recomputation import Policy, SavedTensors

__all__ = ["Block", "fused_block"]

# The MLP works on this many tokens at a time where gate and up are not kept: enough for matrix products to run at full
# speed, few enough that its three wide tensors do not set the peak of memory.
_MLP_TOKENS = 4096


@dataclass(frozen=True)
class Block:
    """Everything a block is and is called with, but its input.

    Args:
        qkv, out, gate_up, down: Linear layers by what input they share.
        norm1, norm2: RMSNorm weights [hidden].
        q_norm, k_norm: RMSNorm weights [head_dim] over each head, or None.
        cos, sin: [positions, rotary_dim], the positions dividing the tokens; None for no rotation.
        batch, seq: Rows and tokens of a row.
        window: Tokens that a token sees at most, itself included; None for all before it.
    """

    qkv: LinearGroup
    out: LinearGroup
    gate_up: LinearGroup
    down: LinearGroup
    norm1: Tensor
    norm2: Tensor
    norm_eps: float
    q_norm: Tensor | None
    k_norm: Tensor | None
    head_eps: float
    cos: Tensor | None
    sin: Tensor | None
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    activation: str
    window: int | None
    documents: Documents | None
    batch: int
    seq: int
    policy: Policy
    save: Callable[[Sequence[Tensor]], SavedTensors]

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return (self.qkv, self.out, self.gate_up, self.down)

    def split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views q, k, v [batch, seq, heads, head_dim] of [tokens, (heads + 2 kv_heads) head_dim]."""
        heads = qkv.view(self.batch, self.seq, -1, self.head_dim)
        q, k, v = heads.split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=2)
        return q, k, v

    def rotate(self, qkv: Tensor, bias: Tensor | None) -> Tensor:
        """Biases, head norms and rotation; in the memory of `qkv` unless its values are needed once more."""
        arguments = (self.cos, self.sin, self.num_heads, self.num_kv_heads, bias)
        if self.q_norm is None:
            rotary_(qkv, *arguments)
            return qkv
        return rotary(qkv, *arguments, self.q_norm, self.k_norm, self.head_eps)


def fused_block(x: Tensor, block: Block) -> Tensor:
    """The block's output [tokens, hidden] for x [tokens, hidden]; differentiable in x and in the adapters."""
    parameters = [parameter for group in block.groups for parameter in group.parameters()]
    if torch.is_grad_enabled() and (x.requires_grad or any(parameter.requires_grad for parameter in parameters)):
        out: Tensor = _FusedBlock.apply(x, block, *parameters)
        return out
    return _forward(x, block)[0]


@dataclass
class _Saved:
    """What a backward pass has of its forward pass. None is what must be computed again, or what there is not."""

    x: Tensor
    qkv: Tensor | None  # as the head norms and the rotation leave it, or take it where there are head norms
    attended: tuple[Tensor, AttentionState] | None
    mid: Tensor | None
    gate_up_x: Tensor | None
    low_out: Tensor | None
    low_down: Tensor | None


class _FusedBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Block, *parameters: Tensor) -> Tensor:
        keeps = block.policy.keeps
        out, saved = _forward(x, block, keep_gate_up="gate_up" in keeps)
        assert saved.attended is not None
        attention, state = saved.attended
        tensors: list[Tensor | None] = [x]
        tensors += [saved.qkv if "qkv" in keeps else None, saved.mid if "mid" in keeps else None]
        tensors += [attention, *state.tensors()] if "attention" in keeps else []
        ctx.block = block
        ctx.present = [tensor is not None for tensor in tensors]
        large = [tensor for tensor in tensors if tensor is not None]
        ctx.large = block.save(large) if block.policy.offload else SavedTensors(large)
        # Without its tensors, which may be moved.
        ctx.state = state.with_tensors([tensor.new_empty(0) for tensor in state.tensors()])
        # The low-rank products are a hundredth of the rest; gate and up are never moved.
        ctx.low_out, ctx.low_down, ctx.gate_up_x = saved.low_out, saved.low_down, saved.gate_up_x
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, grads = _backward(grad.contiguous(), _take(ctx), ctx.block, needs_x=ctx.needs_input_grad[0])
        return grad_x, None, *grads


def _take(ctx: Any) -> _Saved:
    """What the forward pass saved. `ctx` forgets it: a tensor is freed when the backward pass is done with it."""
    large = iter(ctx.large.take())
    tensors: list[Any] = [next(large) if present else None for present in ctx.present]
    x, qkv, mid, *attended = tensors
    saved = _Saved(
        x=x,
        qkv=qkv,
        attended=(attended[0], ctx.state.with_tensors(attended[1:])) if attended else None,
        mid=mid,
        gate_up_x=ctx.gate_up_x,
        low_out=ctx.low_out,
        low_down=ctx.low_down,
    )
    ctx.gate_up_x = ctx.low_out = ctx.low_down = None
    return saved


def _parts(num_tokens: int, whole: bool) -> Iterator[slice]:
    count = 1 if whole else -(-num_tokens // _MLP_TOKENS)
    size = max(1, -(-num_tokens // max(count, 1)))
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def _columns(extended: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The tensor and the low-rank columns beside it."""
    return extended[:, :count], extended[:, count:]


def _attend(normed_x: Tensor, weight: ExtendedWeight, block: Block) -> tuple[Tensor, Tensor, Tensor, AttentionState]:
    """(qkv as it is kept, rotated qkv, attention [tokens, features], its state) of the normed input."""
    raw = normed_x @ weight.forward.T
    rotated = block.rotate(raw, block.qkv.bias(raw.dtype))
    attention, state = attention_forward(
        *block.split_heads(rotated), scale=block.scale, documents=block.documents, window=block.window
    )
    kept = rotated if block.q_norm is None else raw
    return kept, rotated, attention.view(len(normed_x), -1), state


def _add_output(x: Tensor, attention: Tensor, low: Tensor | None, weight: ExtendedWeight) -> Tensor:
    """x + attention Wo^T + low (sB)^T."""
    mid = torch.addmm(x, attention, weight.base.T)
    if low is not None:
        assert weight.up is not None
        mid.addmm_(low, weight.up)
    return mid


def _forward(x: Tensor, block: Block, keep_gate_up: bool = False) -> tuple[Tensor, _Saved]:
    weight = block.qkv.expand(x.dtype, x.device)
    normed_x, _ = rms_norm(x, block.norm1, block.norm_eps, weight.down)
    qkv, rotated, attention, state = _attend(normed_x, weight, block)
    del normed_x, rotated
    weight = block.out.expand(x.dtype, x.device)
    low_out = None if weight.down is None else attention @ weight.down.T
    mid = _add_output(x, attention, low_out, weight)

    weight = block.gate_up.expand(x.dtype, x.device)
    down = block.down.expand(x.dtype, x.device)
    normed_x, _ = rms_norm(mid, block.norm2, block.norm_eps, weight.down)
    out = torch.empty_like(mid)
    low_down = None if down.down is None else x.new_empty(len(x), block.down.rank)
    gate_up_x = None
    for part in _parts(len(x), whole=keep_gate_up):
        # With room for the low-rank columns of the backward pass, which works in this memory.
        gate_up_x = x.new_empty(part.stop - part.start, weight.rows + block.gate_up.rank)
        gate_up = gate_up_x[:, : weight.rows]
        torch.mm(normed_x[part], weight.forward.T, out=gate_up)
        act_x = swiglu(gate_up, down.down, block.activation)
        if low_down is not None:
            low_down[part] = act_x[:, down.columns :]
        torch.addmm(mid[part], act_x, down.forward.T, out=out[part])
    return out, _Saved(
        x=x,
        qkv=qkv,
        attended=(attention, state),
        mid=mid,
        gate_up_x=gate_up_x if keep_gate_up else None,
        low_out=low_out,
        low_down=low_down,
    )


@dataclass
class _AttentionHalf:
    """The first half of a block, as its backward pass needs it."""

    weight: ExtendedWeight
    normed_x: Tensor
    rstd: Tensor
    qkv: Tensor
    rotated: Tensor
    attention: Tensor
    state: AttentionState


def _attention_half(saved: _Saved, block: Block) -> _AttentionHalf:
    """Out of what was kept; the rest is computed again."""
    x = saved.x
    weight = block.qkv.expand(x.dtype, x.device)
    normed_x, rstd = rms_norm(x, block.norm1, block.norm_eps, weight.down)
    if saved.attended is None:
        return _AttentionHalf(weight, normed_x, rstd, *_attend(normed_x, weight, block))
    if saved.qkv is None:
        qkv = normed_x @ weight.forward.T
        rotated = block.rotate(qkv, block.qkv.bias(x.dtype))
    else:
        qkv = saved.qkv
        rotated = qkv if block.q_norm is None else block.rotate(qkv, block.qkv.bias(x.dtype))
    return _AttentionHalf(weight, normed_x, rstd, qkv, rotated, *saved.attended)


def _backward(grad: Tensor, saved: _Saved, block: Block, *, needs_x: bool) -> tuple[Tensor | None, list[Tensor | None]]:
    """Gradients of x and of the adapters for `grad` [tokens, hidden]."""
    x, mid, half = saved.x, saved.mid, None
    if mid is None:
        # Only the attention leads to the MLP's input. Where that was kept, this half waits until the MLP's wide
        # tensors are gone.
        half = _attention_half(saved, block)
        mid = _add_output(x, half.attention, saved.low_out, block.out.expand(x.dtype, x.device))
    grad_normed, rstd2, mlp_grads = _mlp_backward(grad, mid, saved, block)
    weight = block.out.expand(x.dtype, x.device)
    grad_mid_x = rms_norm_backward(grad_normed, mid, block.norm2, rstd2, grad, weight.up)
    del grad_normed, mid, grad
    grad_mid, grad_low = _columns(grad_mid_x, weight.rows)
    half = half or _attention_half(saved, block)
    out_sums = LowRankSums(block.out)
    if saved.low_out is not None:
        out_sums.add(half.attention, saved.low_out, grad_mid, grad_low)
    grad_qkv_x = _attention_backward(grad_mid_x @ weight.backward, half, block)
    del weight
    qkv_sums = LowRankSums(block.qkv)
    if block.qkv.rank:
        qkv_sums.add(*_columns(half.normed_x, half.weight.columns), *_columns(grad_qkv_x, half.weight.rows))
    grads = [*qkv_sums.gradients(), *out_sums.gradients(), *mlp_grads]
    if not needs_x:
        return None, grads
    grad_normed = grad_qkv_x @ half.weight.backward
    return rms_norm_backward(grad_normed, x, block.norm1, half.rstd, grad_mid), grads


def _attention_backward(grad: Tensor, half: _AttentionHalf, block: Block) -> Tensor:
    """Gradient of qkv with its low-rank columns, for `grad` [tokens, features] of the attention's output."""
    by_head = (block.batch, block.seq, block.num_heads, -1)
    grads = attention_backward(
        grad.view(by_head),
        *block.split_heads(half.rotated),
        half.attention.view(by_head),
        half.state,
        scale=block.scale,
        documents=block.documents,
        window=block.window,
    )
    dq, dk, dv = (part.view(len(grad), -1) for part in grads)
    return rotary_backward(
        dq,
        dk,
        dv,
        None if block.q_norm is None else half.qkv,
        block.cos,
        block.sin,
        block.num_heads,
        block.num_kv_heads,
        block.qkv.bias(grad.dtype),
        block.q_norm,
        block.k_norm,
        block.head_eps,
        half.weight.up,
    )


def _mlp_backward(grad: Tensor, mid: Tensor, saved: _Saved, block: Block) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    """(gradient of the normed input of the MLP, its norm's 1/rms, gradients of the adapters)."""
    gate_up = block.gate_up.expand(mid.dtype, mid.device)
    down = block.down.expand(mid.dtype, mid.device)
    normed_x, rstd = rms_norm(mid, block.norm2, block.norm_eps, gate_up.down)
    grad_normed = torch.empty_like(mid)
    gate_up_sums, down_sums = LowRankSums(block.gate_up), LowRankSums(block.down)
    kept, saved.gate_up_x = saved.gate_up_x, None
    for part in _parts(len(mid), whole=kept is not None):
        gate_up_x = kept
        if gate_up_x is None:
            gate_up_x = mid.new_empty(part.stop - part.start, gate_up.rows + block.gate_up.rank)
            torch.mm(normed_x[part], gate_up.forward.T, out=gate_up_x[:, : gate_up.rows])
        grad_x = extend(grad[part], down.up)
        act = grad_x @ down.backward  # its gradient first; swiglu_backward_ puts the activation itself in its place
        swiglu_backward_(gate_up_x, act, gate_up.up, block.activation)
        if saved.low_down is not None:
            down_sums.add(act, saved.low_down[part], *_columns(grad_x, down.rows))
        if block.gate_up.rank:
            gate_up_sums.add(*_columns(normed_x[part], gate_up.columns), *_columns(gate_up_x, gate_up.rows))
        torch.mm(gate_up_x, gate_up.backward, out=grad_normed[part])
    return grad_normed, rstd, [*gate_up_sums.gradients(), *down_sums.gradients()]
