"""A pre-norm decoder block with gated MLP over 4-bit weights and their adapters: one forward, one backward function.

    normed = norm1(x);  qkv = rotate(normed Wqkv^T);  attention = softmax(q k^T) v;  mid = x + attention Wo^T
    normed2 = norm2(mid);  gate_up = normed2 Wgu^T;  out = mid + (act(gate) * up) Wdown^T

every W with its adapter (see linear_group). Activations are [tokens, features]; a name that ends in `_x` has the
group's low-rank columns beside it. A weight is dequantized once in each pass: what a backward pass computes again
shares it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fourfold.kernels.low_rank import new_extended
from fourfold.kernels.low_rank_beside import fill_low_rank_, low_rank_beside
from fourfold.kernels.norm import add_rms_norm_, rms_norm
from fourfold.kernels.swiglu import swiglu
from fourfold.models.attention import AttentionState, attention_forward
from fourfold.models.block_state import Block, Saved, parts
from fourfold.models.linear_group import ExtendedWeight

__all__ = ["attend", "attention_output", "block_forward", "fill_low"]


def attend(normed_x: Tensor, weight: ExtendedWeight, block: Block) -> tuple[Tensor, Tensor, Tensor, AttentionState]:
    """(qkv as it is kept, rotated qkv, attention [tokens, features], its state) of the normed input."""
    raw = normed_x @ weight.forward.T
    rotated = block.rotate(raw, block.qkv.bias(raw.dtype))
    attention, state = attention_forward(
        *block.split_heads(rotated), scale=block.scale, documents=block.documents, window=block.window
    )
    kept = rotated if block.q_norm is None else raw
    return kept, rotated, attention.view(len(normed_x), -1), state


def attention_output(attention: Tensor, weight: ExtendedWeight) -> tuple[Tensor, Tensor | None]:
    """attention Wo^T + low (sB)^T, rounded once, and low, the attention times A^T."""
    if weight.down is None:
        return attention @ weight.forward.T, None
    # The copy is the price of one product: cuBLAS rounds a product before it adds what `addmm` is given.
    attention_x, low = low_rank_beside(attention, weight.down)
    return attention_x @ weight.forward.T, low


def fill_low(normed_x: Tensor, weight: ExtendedWeight) -> Tensor:
    """Puts the normed input's product with A^T, [tokens, rank], beside it, and returns it alone."""
    if weight.down is None:
        # A view of no columns would keep all others alive.
        return normed_x.new_empty(len(normed_x), 0)
    return fill_low_rank_(normed_x, weight.columns, weight.down)


def block_forward(x: Tensor, block: Block, keeps: frozenset[str]) -> tuple[Tensor, Saved]:
    """The block's output [tokens, hidden] for x [tokens, hidden], and what `keeps` names of what it is made of."""
    saved = Saved(x=x)
    weight = block.qkv.expand(x)
    normed_x, rstd = rms_norm(x, block.norm1, block.norm_eps, block.qkv.rank)
    low = fill_low(normed_x, weight)
    qkv, rotated, attention, state = attend(normed_x, weight, block)
    if "qkv" in keeps:
        saved.qkv, saved.rstd1, saved.low_qkv = qkv, rstd, low
    del normed_x, qkv, rotated
    weight = block.out.expand(x)
    mid, saved.low_out = attention_output(attention, weight)
    if "attention" in keeps:
        saved.attention, saved.state = attention, state
    del attention, state

    weight = block.gate_up.expand(x)
    down = block.down.expand(x)
    out = torch.empty_like(mid)
    normed_x, rstd = add_rms_norm_(x, mid, block.norm2, block.norm_eps, block.gate_up.rank, copy=out)
    low = fill_low(normed_x, weight)
    if "mid" in keeps:
        saved.mid = mid
    keeps_gate_up = "gate_up" in keeps
    if keeps_gate_up:
        saved.rstd2, saved.low_gate_up = rstd, low
    if block.down.rank:
        saved.low_down = x.new_empty(len(x), block.down.rank)
    for part in parts(len(x), whole=keeps_gate_up, offload=block.policy.offload):
        # With room for the low-rank columns of the backward pass, which works in this memory.
        gate_up_x = new_extended(x, part.stop - part.start, weight.rows, block.gate_up.rank)
        gate_up = gate_up_x[:, : weight.rows]
        torch.mm(normed_x[part], weight.forward.T, out=gate_up)
        act_x = swiglu(gate_up, down.down, block.activation)
        if saved.low_down is not None:
            saved.low_down[part] = act_x[:, down.columns :]
        out[part].addmm_(act_x, down.forward.T)
        if keeps_gate_up:
            saved.gate_up_x = gate_up_x
        # Gone before the next part allocates its own.
        del gate_up, gate_up_x, act_x
    return out, saved
