"""A decoder layer of a model as decoding computes it: a token for each of some slots of a cache, or a part of a prompt.

On a GPU, with weights of 4 bits, a token goes through the kernels of `decode_norm`, `decode_linear` and
`decode_attention`: eight launches a layer, ten with an adapter. Whatever these do not take goes layer by layer, by the
operators of the fused block; a prompt goes through them as well, with each weight dequantized once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right

from fourfold.kernels.decode_attention import decode_attention_
from fourfold.kernels.decode_linear import MAX_ROWS, decode_linear, serves
from fourfold.kernels.decode_norm import decode_norm, low_products
from fourfold.kernels.launching import next_power_of_2
from fourfold.kernels.low_rank import row_length
from fourfold.kernels.norm import add_rms_norm_, rms_norm
from fourfold.kernels.rotary import rotary
from fourfold.kernels.swiglu import swiglu
from fourfold.models.attention import attention_forward
from fourfold.models.block_state import parts
from fourfold.models.linear_group import AdaptedLinear, LinearGroup
from fourfold.models.weight_room import Expansion, WeightRoom
from fourfold.quantization.linear import QuantizedLinear

__all__ = ["Angles", "DecodeLayer", "DecodeLinears"]

# cos and sin of positions, [positions, rotary_dim].
Angles = tuple[Tensor, Tensor]
# Of gated values, which go from one kernel to the next in fp16: what that can hold with it is 2^20.
GATED_SCALE = 2.0**-4
# Ranks of an adapter that a kernel takes; a tile of the tensor cores has 16.
LEAST_RANK, MOST_RANK = 16, 128


@dataclass(frozen=True)
class DecodeLinears:
    """Linear layers that share an input, at most one adapter each, and what their kernel is given.

    Args:
        group: The layers.
        dtype: What the model computes in.
    """

    group: LinearGroup
    dtype: torch.dtype

    @cached_property
    def bias(self) -> Tensor | None:
        """[out_features] of `dtype`, or None."""
        return self.group.bias(self.dtype)

    @cached_property
    def expansion(self) -> Expansion:
        """What their weights are dequantized by."""
        return Expansion(self.group)

    @cached_property
    def served(self) -> bool:
        """Whether `decode_linear` takes them."""
        if self.expansion.parts is None or self.dtype not in (torch.bfloat16, torch.float16):
            return False
        weights = self.expansion.weights
        first, rows = weights[0], self.expansion.num_rows
        return (
            self._rank <= MOST_RANK
            and serves(first.device, first.codebook, first.block_size, rows, first.shape[1])
            and all(weight.codes.data_ptr() % 16 == 0 for weight in weights)
        )

    @property
    def _rank(self) -> int:
        """Low-rank columns of each layer; 0 where none has an adapter."""
        most = max(linear.rank for linear in self.group.linears)
        return max(LEAST_RANK, next_power_of_2(most)) if most else 0

    @cached_property
    def lora_a(self) -> Tensor | None:
        """[layers * rank, in_features] of `dtype`, zeros where a layer has less."""
        if not self._rank:
            return None
        base = self.group.linears[0].base
        out = torch.zeros(
            len(self.group.linears), self._rank, base.in_features, dtype=self.dtype, device=base.weight.device
        )
        for own, linear in zip(out, self.group.linears, strict=True):
            for adapter in linear.adapters:
                own[: adapter.rank] = adapter.lora_a.detach()
        return out.view(-1, base.in_features)

    @cached_property
    def lora_b(self) -> Tensor | None:
        """[out_features, rank] of `dtype`, times the scaling."""
        if not self._rank:
            return None
        device = self.group.linears[0].base.weight.device
        out = torch.zeros(self.group.out_features, self._rank, dtype=self.dtype, device=device)
        row = 0
        for linear in self.group.linears:
            rows = linear.base.out_features
            for adapter in linear.adapters:
                out[row : row + rows, : adapter.rank] = adapter.lora_b.detach() * adapter.scaling
            row += rows
        return out

    @cached_property
    def arguments(self) -> tuple[Any, ...]:
        """Of `decode_linear`, those between x and dtype."""
        assert self.expansion.parts is not None
        *parts, _, nested_block_size = self.expansion.parts
        return (*parts, nested_block_size, self.expansion.num_rows)

    def run(self, x: Tensor, low: Tensor | None = None, x_scale: float = 1.0, **others: Any) -> Tensor:
        """`decode_linear`; `low` where a norm made it with x."""
        if self.lora_a is not None and low is None:
            low = low_products(x, self.lora_a, x_scale, self.dtype)
        if self.lora_a is not None:
            others |= {"low": low, "up": self.lora_b}
        options: Any = {"dtype": self.dtype, "bias": self.bias, "x_scale": x_scale, **others}
        layers: Any = self.arguments
        out: Tensor = decode_linear(x, *layers, **options)
        return out

    def one_by_one(self, x: Tensor) -> Tensor:
        """[M, out_features], by each layer itself."""
        return torch.cat([_linear(linear, x) for linear in self.group.linears], dim=1)


def _linear(linear: AdaptedLinear, x: Tensor) -> Tensor:
    """Base layer, bias and adapter: as the generic path sums them."""
    base = linear.base
    if isinstance(base, QuantizedLinear):
        own: dict[str, Any] = {}
        for adapter in linear.adapters:
            own = {"low": x @ adapter.lora_a.to(x.dtype).T, "lora_b": adapter.lora_b, "scaling": adapter.scaling}
        quantized: Tensor = base(x, **own)
        return quantized
    out = F.linear(x, base.weight, base.bias)
    for adapter in linear.adapters:
        low = x.to(adapter.lora_a.dtype) @ adapter.lora_a.T
        out = (out + low @ adapter.lora_b.T * adapter.scaling).to(x.dtype)
    return out


@dataclass(frozen=True)
class DecodeLayer:
    """A pre-norm decoder layer with gated MLP, with one adapter or none.

    Args:
        qkv, out, gate_up, down: Linear layers by what input they share.
        norm1, norm2: RMSNorm weights [hidden].
        q_norm, k_norm: RMSNorm weights [head_dim] over each head, or None.
        rotates: Whether q and k are rotated.
        window: Tokens that a token sees at most, itself included; None for all before it.
        activation: One of `swiglu`'s.
    """

    qkv: DecodeLinears
    out: DecodeLinears
    gate_up: DecodeLinears
    down: DecodeLinears
    norm1: Tensor
    norm2: Tensor
    norm_eps: float
    q_norm: Tensor | None
    k_norm: Tensor | None
    head_eps: float
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int | None
    rotates: bool
    activation: str

    @cached_property
    def served(self) -> bool:
        """Whether the kernels of a decode step take it."""
        linears = (self.qkv, self.out, self.gate_up, self.down)
        return self.activation == "silu" and all(one.served for one in linears)

    def decode(
        self, x: Tensor, angles: Angles, keys: Tensor, values: Tensor, slots: Tensor, positions: Tensor
    ) -> Tensor:
        """A token for each of some slots, as `decode_attention_` takes them: [M, hidden] to [M, hidden]."""
        cos, sin = angles if self.rotates else (None, None)
        place = (cos, sin, keys, values, slots, positions)
        heads: dict[str, Any] = {
            **{"scale": self.scale, "window": self.window},
            **{"q_norm": self.q_norm, "k_norm": self.k_norm, "eps": self.head_eps},
        }
        if self.served and len(x) <= MAX_ROWS:
            normed, low = decode_norm(x, self.norm1, self.norm_eps, self.qkv.lora_a)
            attention = decode_attention_(self.qkv.run(normed, low), *place, **heads, as_operand=True)
            mid = self.out.run(attention, residual=x)
            normed, low = decode_norm(mid, self.norm2, self.norm_eps, self.gate_up.lora_a)
            gated = self.gate_up.run(normed, low, activation=self.activation, out_scale=GATED_SCALE)
            return self.down.run(gated, residual=mid, x_scale=1 / GATED_SCALE)
        normed, _ = rms_norm(x, self.norm1, self.norm_eps)
        attention = decode_attention_(self.qkv.one_by_one(normed), *place, **heads)
        mid = self.out.one_by_one(attention)
        normed, _ = add_rms_norm_(x, mid, self.norm2, self.norm_eps)
        gate_up = self.gate_up.one_by_one(normed)
        return mid + self.down.one_by_one(swiglu(gate_up, None, self.activation))

    @cached_property
    def weight_elements(self) -> int:
        """Elements of the weights that a prompt's pass has dequantized at a time."""
        qkv, out, gate_up, down = (one.expansion for one in (self.qkv, self.out, self.gate_up, self.down))
        return max(*(WeightRoom.elements(one) for one in (qkv, out)), WeightRoom.elements(gate_up, down))

    @cached_property
    def token_elements(self) -> int:
        """Elements that a prompt's pass holds of a token at most."""
        hidden, qkv, heads = len(self.norm1), self.qkv.group.out_features, self.out.group.in_features
        gate_up, inner = self.gate_up.group.out_features, self.down.group.in_features
        attention = 2 * qkv + 2 * heads + row_length(hidden, self.qkv.group.rank)
        mlp = 2 * hidden + row_length(hidden, self.gate_up.group.rank)
        mlp += gate_up + row_length(inner, self.down.group.rank)
        return hidden + max(attention, mlp)

    @cached_property
    def _heads(self) -> tuple[Any, ...]:
        return self.num_heads, self.num_kv_heads, self.qkv.bias, self.q_norm, self.k_norm, self.head_eps

    def prefill(
        self,
        x: Tensor,
        angles: Angles,
        keys: Tensor,
        values: Tensor,
        slot: int | Tensor,
        weights: WeightRoom,
        start: int = 0,
        only: slice | Tensor | None = None,
    ) -> Tensor:
        """Tokens of one sequence, from `start` on.

        Args:
            x: [length, hidden].
            angles: Of these positions.
            keys, values: [slots, kv_heads, length of the cache, head_dim], of which a slot's before `start` are read,
                and the tokens' own are written.
            slot: Which; an int64 tensor [1] where `start` is 0, which a captured pass reads whenever it is replayed.
            weights: Room for this layer's.
            only: Tokens whose output is wanted; None for all.

        Returns:
            [length or tokens wanted, hidden].
        """
        length = len(x)
        cos, sin = angles if self.rotates else (None, None)
        weight = weights.expand(self.qkv.expansion)
        normed_x, _ = rms_norm(x, self.norm1, self.norm_eps, weight.rank)
        weight.fill_low(normed_x)
        rotated = rotary(normed_x @ weight.forward, cos, sin, *self._heads)
        counts = [self.num_heads, self.num_kv_heads, self.num_kv_heads]
        q, k, v = rotated.view(1, length, -1, self.head_dim).split(counts, dim=2)
        for held, new in ((keys, k), (values, v)):
            if isinstance(slot, Tensor):
                held[:, :, :length].index_copy_(0, slot, new.transpose(1, 2))
            else:
                held[slot, :, start : start + length] = new[0].transpose(0, 1)
        if start == 0:
            attention, _ = attention_forward(q, k, v, scale=self.scale, window=self.window)
            attention = attention.view(length, -1)
        else:
            attention = self._attend_behind(q[0].transpose(0, 1), keys[slot], values[slot], start)
        if only is not None:
            x, attention = x[only], attention[only]
        # What comes has need of the memory.
        del normed_x, rotated, q, k, v, new
        mid = weights.expand(self.out.expansion).product(attention)
        del attention
        weight = weights.expand(self.gate_up.expansion)
        down = weights.expand(self.down.expansion, behind=self.gate_up.expansion)
        out = torch.empty_like(mid)
        normed_x, _ = add_rms_norm_(x, mid, self.norm2, self.norm_eps, weight.rank, copy=out)
        weight.fill_low(normed_x)
        for part in parts(len(x), whole=False, offload=False):
            act_x = swiglu(normed_x[part] @ weight.forward, down.down, self.activation)
            out[part].addmm_(act_x, down.forward)
        return out

    def _attend_behind(self, q: Tensor, keys: Tensor, values: Tensor, start: int) -> Tensor:
        """Attention of q [heads, length, head_dim] to what stood in the slot, and to the tokens themselves."""
        length, end = q.shape[1], start + q.shape[1]
        first = 0 if self.window is None else max(0, start - self.window + 1)
        k, v = keys[None, :, first:end], values[None, :, first:end]
        mask: Any = causal_lower_right(length, end - first)
        if self.window is not None:
            ahead = torch.arange(first, end, device=q.device) - torch.arange(start, end, device=q.device)[:, None]
            mask = (ahead <= 0) & (ahead > -self.window)
        repeats = self.num_heads // self.num_kv_heads
        if repeats > 1:
            k, v = k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)
        out = F.scaled_dot_product_attention(q[None], k, v, attn_mask=mask, scale=self.scale)
        return out[0].transpose(0, 1).reshape(length, -1)
