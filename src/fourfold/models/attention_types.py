"""What the attention functions are told, what they keep, and what a row of the table of kernels is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["AttentionBackend", "AttentionCase", "AttentionState", "Documents"]


@dataclass(frozen=True)
class Documents:
    """Where the documents of packed rows begin and end, over the flattened [batch * seq] tokens.

    Attributes:
        cu_seqlens: int32 [documents + 1] on the device of q: 0, the end of the first document, ..., batch * seq. No
            document crosses the end of a row, and every token belongs to one: padding forms documents of its own.
        max_length: Tokens of the longest document, or more.
    """

    cu_seqlens: Tensor
    max_length: int

    def are_rows(self, batch: int) -> bool:
        """Whether each of `batch` rows is one document, which plain causal attention serves: as many documents as rows,
        and none crosses the end of one."""
        return self.cu_seqlens.shape[0] == batch + 1


@dataclass(frozen=True)
class AttentionState:
    """What the backward needs beside q, k, v and out.

    Attributes:
        backend: The row of `ATTENTION` that ran the forward; its backward must follow.
        lse: Log-sum-exp of each query's scores, in the backend's own layout.
        philox: Seed and offset of dropout's random numbers, which the operators want although dropout is 0. A few
            bytes, or None.
    """

    backend: str
    lse: Tensor
    philox: tuple[Tensor | None, Tensor | None] = (None, None)

    def tensors(self) -> list[Tensor]:
        """What is worth moving or saving: [lse]."""
        return [self.lse]

    def with_tensors(self, tensors: list[Tensor]) -> AttentionState:
        """The same state over tensors that were moved, in the order of `tensors`."""
        (lse,) = tensors
        return replace(self, lse=lse)


class AttentionCase(NamedTuple):
    """What decides which backend may run, and nothing else: the key of the choice. A tuple: one is made at each call.

    Attributes:
        device_type: "cuda", "cpu", ...
        capability: Compute capability of the CUDA device, (0, 0) elsewhere.
        dtype: Of q, k and v.
        length: Tokens in a row.
        documents: Whether rows are packed.
        window: How many tokens a query sees, itself among them; None for all before it.
        deterministic: Whether torch.use_deterministic_algorithms is on.
    """

    device_type: str
    capability: tuple[int, int]
    dtype: torch.dtype
    length: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    documents: bool
    window: int | None
    deterministic: bool


Forward = Callable[[Tensor, Tensor, Tensor, float, Documents | None, int | None], tuple[Tensor, AttentionState]]
Backward = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, AttentionState, float, Documents | None, int | None],
    tuple[Tensor, Tensor, Tensor],
]


@dataclass(frozen=True)
class AttentionBackend:
    """One row: why it cannot, or should not, run a case (None when it can), its forward and its backward.

    Forward takes q, k, v, scale, documents and window; backward takes grad_out, q, k, v, out, state and the same three.
    q, k and v are [batch, seq, heads, head_dim] with any strides but a contiguous last dimension; grad_out and out are
    contiguous.
    """

    name: str
    refuses: Callable[[AttentionCase], str | None]
    forward: Forward
    backward: Backward
