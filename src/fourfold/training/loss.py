"""Cross entropy over the supervised positions only, in chunks, without the logits of the whole batch.

In supervised fine-tuning most positions carry no label: the prompt, the padding. Their logits cost as much
as the others' and are thrown away. Here only the hidden states that have a label go through the LM head,
some at a time; the gradient of a chunk is taken while its logits are there, so that at no moment more than
one chunk of logits exists (as Liger's fused linear cross entropy does it, https://arxiv.org/abs/2410.10989).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional

__all__ = ["SupervisedLoss", "supervised_cross_entropy"]

IGNORE_INDEX = -100
# 128 MiB of fp32 logits a chunk: few enough to be cheap, many enough to keep the matrix product busy.
_LOGITS_PER_CHUNK = 2**25


@dataclass(frozen=True)
class SupervisedLoss:
    """Sums over the supervised positions of a batch; scalars on the device of the hidden states.

    Attributes:
        loss_sum: Sum of the negative log-likelihoods, fp32 (fp64 for a model in fp64), differentiable.
        num_tokens: How many positions it sums over, int64.
        num_correct: How many of them the model ranks first, int64.
    """

    loss_sum: torch.Tensor
    num_tokens: torch.Tensor
    num_correct: torch.Tensor


def supervised_cross_entropy(hidden_states: torch.Tensor, labels: torch.Tensor, lm_head: nn.Module) -> SupervisedLoss:
    """Sum of the cross entropies of all positions whose next token has a label.

    Args:
        hidden_states: [batch, seq, hidden], what the LM head takes.
        labels: [batch, seq], int64, -100 where there is none; shifted here, as Transformers does.
        lm_head: From [tokens, hidden] to logits [tokens, vocab]. It is called as it is, so it may be
            quantized or trainable.
    """
    targets = labels[:, 1:].to(hidden_states.device)
    supervised = targets != IGNORE_INDEX
    hidden = hidden_states[:, :-1][supervised]  # [tokens, hidden]
    trainable = [parameter for parameter in lm_head.parameters() if parameter.requires_grad]
    differentiable = torch.is_grad_enabled() and (hidden.requires_grad or bool(trainable))
    loss_sum, num_correct = _ChunkedCrossEntropy.apply(hidden, targets[supervised], lm_head, differentiable, *trainable)
    return SupervisedLoss(loss_sum, supervised.sum(), num_correct)


class _ChunkedCrossEntropy(torch.autograd.Function):
    """(hidden [tokens, hidden], targets [tokens]) -> (sum of the losses, number ranked first)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        lm_head: nn.Module,
        differentiable: bool,
        *trainable: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss_dtype = torch.promote_types(hidden.dtype, torch.float32)
        loss_sum = hidden.new_zeros((), dtype=loss_dtype)
        num_correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        grad_hidden = torch.zeros_like(hidden) if differentiable else None
        grad_trainable = [torch.zeros_like(parameter) for parameter in trainable]

        start, size = 0, 1  # the first position tells how wide the vocabulary is
        while start < len(hidden):
            chunk = hidden[start : start + size].detach().requires_grad_(differentiable)
            target = targets[start : start + size]
            with torch.set_grad_enabled(differentiable):
                logits = lm_head(chunk).to(loss_dtype)  # [chunk, vocab]
                loss = functional.cross_entropy(logits, target, reduction="sum")
            if grad_hidden is not None:
                grad_chunk, *grads = torch.autograd.grad(loss, [chunk, *trainable])
                grad_hidden[start : start + size] = grad_chunk
                for total, grad in zip(grad_trainable, grads, strict=True):
                    total += grad
            loss_sum += loss.detach()
            num_correct += (logits.detach().argmax(dim=-1) == target).sum()
            start += size
            size = max(1, _LOGITS_PER_CHUNK // logits.shape[-1])

        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden, *grad_trainable)
        ctx.mark_non_differentiable(num_correct)
        return loss_sum, num_correct

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        grad_hidden, *grad_trainable = ctx.saved_tensors
        return (
            grad_hidden * grad_loss.to(grad_hidden.dtype),
            None,
            None,
            None,
            *(grad * grad_loss.to(grad.dtype) for grad in grad_trainable),
        )
