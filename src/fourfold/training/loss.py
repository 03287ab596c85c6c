"""Cross entropy over the supervised positions only, in chunks, without the logits of the whole batch.

In supervised fine-tuning most positions carry no label: the prompt, the padding. Their logits cost as much
as the others' and are thrown away. Here only the hidden states that have a label go through the LM head,
some at a time; the gradient of a chunk is taken while its logits are there, so that at no moment more than
one chunk of logits exists (as Liger's fused linear cross entropy does it, https://arxiv.org/abs/2410.10989).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from fourfold.data import supervised_positions
from fourfold.kernels.cross_entropy import AUTOGRAD_LOGITS, IGNORE_INDEX, cross_entropy_, rows_at_once
from fourfold.models.sharding import plain_class
from fourfold.quantization.linear import QuantizedLinear

__all__ = [
    "IGNORE_INDEX",
    "FrozenHeadCrossEntropy",
    "SupervisedLoss",
    "frozen_linear",
    "logits_agree",
    "supervised_cross_entropy",
]


@dataclass(frozen=True)
class SupervisedLoss:
    """Sums over the supervised positions of a batch; scalars on the device of the hidden states.

    Attributes:
        loss_sum: Sum of the negative log-likelihoods, fp32 (fp64 for a model in fp64), differentiable.
        num_tokens: How many positions it sums over, int64.
        num_correct: How many of them the model ranks first, int64.
    """

    loss_sum: Tensor
    num_tokens: Tensor
    num_correct: Tensor


def supervised_cross_entropy(
    hidden_states: Tensor, labels: Tensor, lm_head: nn.Module, positions: Tensor | None = None
) -> SupervisedLoss:
    """Sum of the cross entropies of all positions whose next token has a label.

    A frozen linear head, quantized or not, takes the short way: one product for a chunk's logits, one kernel for
    its loss and gradient, one product back. Beyond the hidden states' gradient, which the backward pass holds twice
    while it scales it, that takes at most 256 MiB of logits on a GPU (512 MiB where the model is narrow), two chunks
    of hidden states, and the weight where it must be dequantized or cast. Any other head is called as it is, under
    autograd.

    Args:
        hidden_states: [batch, seq, hidden], what the LM head takes.
        labels: [batch, seq], int64, -100 where there is none; shifted here, as Transformers does.
        lm_head: From [tokens, hidden] to logits [tokens, vocab]; may be quantized or trainable.
        positions: int64 [tokens] on the device of the hidden states, what `supervised_positions(labels)` gives;
            without it the host waits for the device to count them.
    """
    labels = labels.to(hidden_states.device)
    if positions is None:
        positions = supervised_positions(labels)
    hidden = hidden_states.reshape(-1, hidden_states.shape[-1])  # [batch * seq, hidden]
    targets = labels.reshape(-1).index_select(0, positions + 1)
    num_tokens = torch.full((), len(positions), dtype=torch.int64, device=hidden.device)
    trainable = [parameter for parameter in lm_head.parameters() if parameter.requires_grad]
    frozen = None if trainable else frozen_linear(lm_head, hidden)
    if frozen is not None:
        differentiable = torch.is_grad_enabled() and hidden.requires_grad
        losses, num_correct = FrozenHeadCrossEntropy.apply(hidden, positions, targets, *frozen, differentiable)
        loss_sum = losses.sum()
    else:
        hidden = hidden.index_select(0, positions)
        differentiable = torch.is_grad_enabled() and (hidden.requires_grad or bool(trainable))
        loss_sum, num_correct = _AutogradCrossEntropy.apply(hidden, targets, lm_head, differentiable, *trainable)
    return SupervisedLoss(loss_sum, num_tokens, num_correct)


def frozen_linear(lm_head: nn.Module, hidden: Tensor) -> tuple[Tensor, Tensor | None] | None:
    """Weight and bias in the dtype of the logits, if the head is no more than its product with `hidden`."""
    kind, head = plain_class(lm_head), cast(Any, lm_head)
    is_autocast = torch.is_autocast_enabled(hidden.device.type)
    dtype = torch.get_autocast_dtype(hidden.device.type) if is_autocast else hidden.dtype
    if kind is QuantizedLinear and not head.number_format.is_vectorwise:
        weight = head.quantized.dequantize(dtype)
    elif kind is nn.Linear and (is_autocast or head.weight.dtype == dtype):
        weight = head.weight.detach().to(dtype)
    else:
        return None
    if weight.device != hidden.device:
        return None
    return weight, None if head.bias is None else head.bias.detach().to(dtype)


def _scaled(gradient: Tensor, scale: Tensor) -> Tensor:
    """gradient * scale, multiplied in the wider dtype and rounded once, in one pass."""
    if scale.dim() == 0:
        # It would be rounded to the gradient's dtype first: an error of all its elements alike.
        scale = scale.reshape([1] * gradient.dim())
    return torch.mul(gradient, scale, out=torch.empty_like(gradient))


class FrozenHeadCrossEntropy(torch.autograd.Function):
    """(hidden [batch * seq, hidden], positions, targets [tokens], W, b) -> (losses [tokens], number ranked first)."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        positions: Tensor,
        targets: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        differentiable: bool,
    ) -> tuple[Tensor, Tensor]:
        vocab = weight.shape[0]
        rows = max(1, AUTOGRAD_LOGITS // vocab)
        if hidden.is_cuda:
            rows = rows_at_once(vocab, weight.shape[1], weight.element_size())
        # Rows start on 128 bytes whatever the vocabulary is: the products and the kernel load vectors.
        buffer = weight.new_empty(min(rows, len(positions)), -(-vocab // 64) * 64)[:, :vocab]
        grad_hidden = torch.zeros_like(hidden) if differentiable else None
        losses = [weight.new_empty(0, dtype=torch.promote_types(weight.dtype, torch.float32))]
        ranked_first = [weight.new_empty(0, dtype=torch.bool)]
        for start in range(0, len(positions), rows):
            index = positions[start : start + rows]
            chunk = hidden.index_select(0, index).to(weight.dtype)
            logits = buffer[: len(index)]
            if bias is None:
                torch.mm(chunk, weight.t(), out=logits)
            else:
                torch.addmm(bias, chunk, weight.t(), out=logits)
            loss, is_first = cross_entropy_(logits, targets[start : start + rows], differentiable)
            losses.append(loss)
            ranked_first.append(is_first)
            if grad_hidden is not None:
                # From here on the logits are their own gradient.
                grad_hidden.index_copy_(0, index, torch.mm(logits, weight).to(hidden.dtype))
        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden, positions)
        num_correct = torch.cat(ranked_first).sum()
        ctx.mark_non_differentiable(num_correct)
        return torch.cat(losses), num_correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, positions = ctx.saved_tensors
        # The head is frozen, so a token's loss reaches its own hidden state alone.
        scale = grad_losses.new_zeros(len(grad_hidden), 1).index_copy_(0, positions, grad_losses[:, None])
        return _scaled(grad_hidden, scale), None, None, None, None, None


class _AutogradCrossEntropy(torch.autograd.Function):
    """(hidden [tokens, hidden], targets [tokens]) -> (sum of the losses, number ranked first), for any head."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        targets: Tensor,
        lm_head: nn.Module,
        differentiable: bool,
        *trainable: Tensor,
    ) -> tuple[Tensor, Tensor]:
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
            size = max(1, AUTOGRAD_LOGITS // logits.shape[-1])

        if grad_hidden is not None:
            ctx.save_for_backward(grad_hidden, *grad_trainable)
        ctx.mark_non_differentiable(num_correct)
        return loss_sum, num_correct

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad_hidden, *grad_trainable = (_scaled(grad, grad_loss) for grad in ctx.saved_tensors)
        return grad_hidden, None, None, None, *grad_trainable


def logits_agree(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Whether two logits are the same but for their roundings; the coarsest here is bf16's."""
    return torch.allclose(ours.float(), theirs.float(), rtol=2e-2, atol=2e-2 * float(theirs.abs().max()))
