"""The fused block as a function of autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fourfold.models.block_backward import block_backward
from fourfold.models.block_forward import block_forward
from fourfold.models.block_state import Block, Saved
from fourfold.models.recomputation import SavedTensors

__all__ = ["fused_block"]


def fused_block(x: Tensor, block: Block, in_order: bool = False) -> Tensor:
    """The block's output [tokens, hidden] for x [tokens, hidden]; differentiable in x and in the adapters.

    Args:
        in_order: Whether the adapters' gradients arrive in the order in which those of layers called one by one would,
            and not in one that autograd's queue happens to make of gradients that are there at once.
    """
    if block.needs_gradients(x):
        parameters: Sequence[Tensor] = block.parameters()
        if in_order:
            # A node each, later ones first: as those of the layers' own products.
            parameters = [parameter.view_as(parameter) for parameter in parameters]
        out: Tensor = _FusedBlock.apply(x, block, *parameters)
        return out
    return block_forward(x, block, frozenset())[0]


class _FusedBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, block: Block, *parameters: Tensor) -> Tensor:
        out, saved = block_forward(x, block, block.policy.keeps)
        large = saved.take_out()
        ctx.block, ctx.saved = block, saved
        ctx.large = block.save(large) if block.policy.offload else SavedTensors(large)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        block: Block = ctx.block
        saved = _take(ctx)
        # Held by nobody else: freed when it is done with.
        grad_x, grads = block_backward(
            block.room.take(grad, block.down.rank), saved, block, needs_x=ctx.needs_input_grad[0]
        )
        return None if grad_x is None else block.room.leave(grad_x, grad.shape[1]), None, *grads


def _take(ctx: Any) -> Saved:
    """What the forward pass saved. `ctx` forgets it: a tensor is freed when the backward pass is done with it."""
    large = ctx.large.take()
    saved, ctx.saved = ctx.saved, None
    return saved.put_back(large)  # type: ignore[no-any-return]
