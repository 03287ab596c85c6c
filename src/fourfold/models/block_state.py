"""What a fused block is called with, and what its forward pass leaves for its backward pass."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fourfold.kernels.low_rank import with_room
from fourfold.kernels.rotary import rotary, rotary_
from fourfold.models.attention import AttentionState, Documents
from fourfold.models.linear_group import LinearGroup
from fourfold.models.recomputation import Policy, SavedTensors

__all__ = ["Block", "GradientRoom", "Saved", "columns", "parts"]

# Where gate and up are not kept, the MLP works on a part of the tokens at a time: on this many, enough for matrix
# products to run at full speed, or on an eighth of them, where its three wide tensors are small beside the rest. Twice
# as many are a little faster, and small beside what is kept where that stays on the device.
MLP_TOKENS = 2048
MLP_PARTS = 8


class GradientRoom:
    """Hands a gradient with room for low-rank columns beside it from one block's backward pass to the next one's.

    Autograd knows the gradient alone. Where the next block is given what the last one left here, it has the room, too,
    and need not copy the gradient to where there is some.
    """

    def __init__(self) -> None:
        self._left: Tensor | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> GradientRoom:
        """A copied model passes gradients of its own."""
        return GradientRoom()

    def clear(self) -> None:
        """Forget what was left."""
        self._left = None

    def leave(self, extended: Tensor, width: int) -> Tensor:
        """The gradient of [tokens, width + room], whose memory is kept until the next `take`."""
        self._left = extended
        return extended[:, :width]

    def take(self, grad: Tensor, rank: int) -> Tensor:
        """[tokens, width + rank] that begins with `grad` [tokens, width], where possible in its memory."""
        left, self._left = self._left, None
        num_rows, width = grad.shape
        # Kept since it was left, this memory can be nobody else's.
        is_it = left is not None and (left.data_ptr(), left.stride()) == (grad.data_ptr(), grad.stride())
        if left is not None and is_it and len(left) == num_rows and left.shape[1] >= width + rank:
            return left[:, : width + rank]
        if not rank:
            return grad.contiguous()
        return with_room(grad, rank)


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
        rotation: The tensor that cos was made of; the same for all layers of a forward pass.
        save: Keeps tensors for the backward pass elsewhere.
        room: The same for all layers.
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
    rotation: Tensor | None
    save: Callable[[Sequence[Tensor]], SavedTensors]
    room: GradientRoom

    @property
    def groups(self) -> tuple[LinearGroup, ...]:
        return (self.qkv, self.out, self.gate_up, self.down)

    def parameters(self) -> list[nn.Parameter]:
        """Of all adapters, in the order in which `block_backward` gives their gradients."""
        return [parameter for group in self.groups for parameter in group.parameters()]

    def needs_gradients(self, x: Tensor) -> bool:
        """Whether a backward pass will follow."""
        if not torch.is_grad_enabled():
            return False
        return x.requires_grad or any(parameter.requires_grad for parameter in self.parameters())

    def fingerprint(self) -> tuple[Hashable, ...]:
        """Whatever decides which kernels run on which memory, but the input and the rotation."""
        weights = [self.norm1, self.norm2, self.q_norm, self.k_norm]
        return (
            *(None if weight is None else weight.data_ptr() for weight in weights),
            *(linear.fingerprint() for group in self.groups for linear in group.linears),
            *(self.norm_eps, self.head_eps, self.num_heads, self.num_kv_heads, self.head_dim, self.scale),
            *(self.activation, self.window, self.batch, self.seq, self.policy),
        )

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


@dataclass
class Saved:
    """What a backward pass has of its forward pass. None is what must be computed again, or what there is not.

    Attributes:
        x: The input.
        qkv: As the head norms and the rotation leave it; where there are head norms, as they take it.
        attention, state: The attention's output, and its log-sum-exp.
        mid: The residual stream between attention and MLP.
        gate_up_x: Gate and up, with room for the low-rank columns of their gradient.
        rstd1, rstd2: The norms' reciprocal root mean squares, fp32 [tokens], where what the norm leads to is kept.
        low_qkv, low_out, low_gate_up, low_down: The inputs of the groups times their A^T, [tokens, rank].
    """

    x: Tensor | None = None
    qkv: Tensor | None = None
    mid: Tensor | None = None
    attention: Tensor | None = None
    state: AttentionState | None = None
    gate_up_x: Tensor | None = None
    rstd1: Tensor | None = None
    rstd2: Tensor | None = None
    low_qkv: Tensor | None = None
    low_out: Tensor | None = None
    low_gate_up: Tensor | None = None
    low_down: Tensor | None = None
    _taken: list[str] = field(default_factory=list)

    def take_out(self) -> list[Tensor]:
        """The tensors that may wait elsewhere, which are forgotten here: all large ones but `gate_up_x`."""
        names = [name for name in ("x", "qkv", "mid", "attention") if getattr(self, name) is not None]
        tensors: list[Tensor] = [getattr(self, name) for name in names]
        if self.state is not None:
            lse = self.state.tensors()
            self.state = self.state.with_tensors([tensor.new_empty(0) for tensor in lse])
            tensors += lse
        for name in names:
            setattr(self, name, None)
        self._taken = names
        return tensors

    def put_back(self, tensors: Sequence[Tensor]) -> Saved:
        """Undo `take_out`."""
        for name, tensor in zip(self._taken, tensors, strict=False):
            setattr(self, name, tensor)
        if self.state is not None:
            self.state = self.state.with_tensors(list(tensors[len(self._taken) :]))
        return self


def parts(num_tokens: int, *, whole: bool, offload: bool) -> Iterator[slice]:
    """All tokens, or about equally many at a time: see `MLP_TOKENS`."""
    most = MLP_TOKENS if offload else 2 * MLP_TOKENS
    count = 1 if whole else min(MLP_PARTS, -(-num_tokens // most))
    size = max(1, -(-num_tokens // max(count, 1)))
    for start in range(0, num_tokens, size):
        yield slice(start, min(start + size, num_tokens))


def columns(extended: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The tensor and the low-rank columns beside it."""
    return extended[:, :count], extended[:, count:]
