"""The cross entropy of each supervised token, never with the logits of more than a chunk of them.

What weighs the tokens is not known before all of them are: the log-probabilities of two answers go into one loss. Of a
frozen head, a token's gradient is its own hidden state's alone, so it is taken while the logits are there and weighed
in the backward pass. Of any other head, the backward pass computes the logits again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fourfold.data import supervised_positions
from fourfold.kernels.cross_entropy import AUTOGRAD_LOGITS
from fourfold.training.loss import FrozenHeadCrossEntropy, SupervisedLoss, frozen_linear

__all__ = ["TokenLosses", "losses_of_logits", "token_losses"]


@dataclass(frozen=True)
class TokenLosses:
    """Of each supervised token of a batch, in the order of its positions.

    Attributes:
        losses: Negative log-likelihoods, fp32 (fp64 for a model in fp64) [tokens], differentiable.
        rows: The row of the batch that each is in, int64 [tokens].
        num_rows: Rows of the batch.
        num_correct: How many of them the model ranks first, int64 scalar.
    """

    losses: Tensor
    rows: Tensor
    num_rows: int
    num_correct: Tensor

    def by_row(self, counted: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Log-probability of each row's supervised tokens, summed up, and their number: both [rows], of one dtype.

        Args:
            counted: bool [tokens]: which of them; None: all.
        """
        ones = torch.ones_like(self.losses.detach()) if counted is None else counted.to(self.losses.dtype)
        log_probs = self.losses.new_zeros(self.num_rows).index_add(0, self.rows, -self.losses * ones)
        return log_probs, self.losses.new_zeros(self.num_rows).index_add(0, self.rows, ones)

    def summed(self) -> SupervisedLoss:
        """The sums over all of them, without gradients."""
        num_tokens = torch.full((), len(self.losses), dtype=torch.int64, device=self.losses.device)
        return SupervisedLoss(self.losses.detach().sum(), num_tokens, self.num_correct)


def token_losses(
    hidden_states: Tensor, labels: Tensor, lm_head: nn.Module, positions: Tensor | None = None
) -> TokenLosses:
    """The cross entropy of each position whose next token has a label.

    Args are those of `fourfold.training.loss.supervised_cross_entropy`.
    """
    labels = labels.to(hidden_states.device)
    if positions is None:
        positions = supervised_positions(labels)
    hidden = hidden_states.reshape(-1, hidden_states.shape[-1])  # [batch * seq, hidden]
    targets = labels.reshape(-1).index_select(0, positions + 1)
    trainable = [parameter for parameter in lm_head.parameters() if parameter.requires_grad]
    frozen = None if trainable else frozen_linear(lm_head, hidden)
    if frozen is not None:
        differentiable = torch.is_grad_enabled() and hidden.requires_grad
        losses, num_correct = FrozenHeadCrossEntropy.apply(hidden, positions, targets, *frozen, differentiable)
    else:
        chosen = hidden.index_select(0, positions)
        losses, num_correct = _RecomputedCrossEntropy.apply(chosen, targets, lm_head, *trainable)
    return TokenLosses(losses, positions // labels.shape[1], labels.shape[0], num_correct)


def losses_of_logits(logits: Tensor, labels: Tensor, positions: Tensor | None = None) -> TokenLosses:
    """The same from the logits of all positions, [batch, seq, vocab], for models that scale or cap theirs."""
    labels = labels.to(logits.device)
    if positions is None:
        positions = supervised_positions(labels)
    targets = labels.reshape(-1).index_select(0, positions + 1)
    chosen = logits.reshape(-1, logits.shape[-1]).index_select(0, positions)
    chosen = chosen.to(torch.promote_types(chosen.dtype, torch.float32))
    losses = functional.cross_entropy(chosen, targets, reduction="none")
    num_correct = (chosen.detach().argmax(dim=-1) == targets).sum()
    return TokenLosses(losses, positions // labels.shape[1], labels.shape[0], num_correct)


class _RecomputedCrossEntropy(torch.autograd.Function):
    """(hidden [tokens, hidden], targets [tokens]) -> (losses [tokens], number ranked first), for any head."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, targets: Tensor, lm_head: nn.Module, *trainable: Tensor
    ) -> tuple[Tensor, Tensor]:
        losses = hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))
        num_correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        start, size = 0, 1  # the first position tells how wide the vocabulary is
        while start < len(hidden):
            target = targets[start : start + size]
            logits = lm_head(hidden[start : start + size]).to(losses.dtype)  # [chunk, vocab]
            losses[start : start + size] = functional.cross_entropy(logits, target, reduction="none")
            num_correct += (logits.argmax(dim=-1) == target).sum()
            start += size
            size = max(1, AUTOGRAD_LOGITS // logits.shape[-1])
        ctx.save_for_backward(hidden, targets)
        ctx.lm_head, ctx.trainable, ctx.size = lm_head, trainable, size
        ctx.autocast = torch.is_autocast_enabled(hidden.device.type)
        ctx.mark_non_differentiable(num_correct)
        return losses, num_correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, targets = ctx.saved_tensors
        grad_hidden = torch.zeros_like(hidden)
        grad_trainable = [torch.zeros_like(parameter) for parameter in ctx.trainable]
        for start in range(0, len(hidden), ctx.size):
            part = slice(start, start + ctx.size)
            chunk = hidden[part].detach().requires_grad_()
            with torch.enable_grad(), torch.autocast(hidden.device.type, enabled=ctx.autocast):
                logits = ctx.lm_head(chunk).to(grad_losses.dtype)
                losses = functional.cross_entropy(logits, targets[part], reduction="none")
                # Summed up with their weights, so that nothing is scaled once it is rounded.
                grads = torch.autograd.grad((losses * grad_losses[part]).sum(), [chunk, *ctx.trainable])
            grad_hidden[part] = grads[0]
            for total, grad in zip(grad_trainable, grads[1:], strict=True):
                total += grad
        return grad_hidden, None, None, *grad_trainable
