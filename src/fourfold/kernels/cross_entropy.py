"""Cross entropy of a chunk of logits, whose gradient takes the logits' place.

    loss = log(sum_j exp(x_j)) - x_t,    d loss / d x_j = exp(x_j) / sum_k exp(x_k) - [j = t]

A head with a vocabulary of 128,256 makes 250 MiB of bf16 logits from 1,024 positions, so what counts is how
often they are read: once for the sum (online, https://arxiv.org/abs/1805.02867), once for the gradient.
"""

from __future__ import annotations

import logging
from typing import cast

import torch
from torch import Tensor

from fourfold.kernels.availability import say_once, triton_refuses

__all__ = ["AUTOGRAD_LOGITS", "IGNORE_INDEX", "cross_entropy_", "cross_entropy_reference", "rows_at_once"]

logger = logging.getLogger(__name__)

IGNORE_INDEX = -100

# Logits of a chunk: few enough to be cheap, many enough to keep the matrix product busy. 256 MiB in 16 bits are 1,024
# positions of a vocabulary of 128,256, whose gradient [1024, 4096] is one wave of tiles on 132 processors.
BYTES_AT_ONCE = 2**28
GRADIENTS_AT_ONCE = 2**22
# Where autograd needs a copy in fp32, 128 MiB; and off the GPU.
AUTOGRAD_LOGITS = 2**25

torch.library.define(
    "fourfold::cross_entropy_",
    "(Tensor(a!) logits, Tensor targets, bool gradient) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_op = torch.ops.fourfold.cross_entropy_.default


def cross_entropy_(logits: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """Cross entropy of each row of logits; with `gradient`, the logits are overwritten by its gradient.

    Nothing here is scaled and nothing is recorded for autograd.

    Args:
        logits: [tokens, vocab], fp16, bf16, fp32 or fp64; stride 1 along the vocabulary.
        targets: int64 [tokens], each in [0, vocab), or -100 for a row that has no loss and no gradient.
        gradient: Whether `logits` becomes softmax(logits) - onehot(targets), rounded once to its dtype;
            without it `logits` stays.

    Returns:
        Loss of each row, fp32 (fp64 of fp64 logits) [tokens], and whether the target is the row's first greatest
        logit, bool [tokens].
    """
    return cast("tuple[Tensor, Tensor]", _op(logits, targets, gradient))


def cross_entropy_reference(logits: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    """`cross_entropy_` in PyTorch."""
    ignored = targets == IGNORE_INDEX
    column = targets.masked_fill(ignored, 0)[:, None]
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    log_probabilities = wide.log_softmax(dim=1)
    loss = log_probabilities.gather(1, column).squeeze(1).neg().masked_fill(ignored, 0.0)
    ranked_first = (wide.argmax(dim=1) == targets) & ~ignored
    if gradient:
        slope = log_probabilities.exp_()
        slope.scatter_add_(1, column, torch.full_like(column, -1, dtype=slope.dtype))
        logits.copy_(slope.masked_fill_(ignored[:, None], 0.0))
    return loss, ranked_first


def rows_at_once(vocab: int, hidden: int, element_size: int) -> int:
    """Rows of logits that a GPU should be given at a time, for a head [vocab, hidden]."""
    num_logits = BYTES_AT_ONCE // element_size
    # A narrow model's chunk is up to twice as long, so that the product back fills the processors, too.
    rows = max(1, min(max(num_logits // vocab, GRADIENTS_AT_ONCE // hidden), 2 * num_logits // vocab))
    return rows - rows % 128 if rows > 128 else rows  # whole tiles of the matrix product


def _cuda(logits: Tensor, targets: Tensor, gradient: bool) -> tuple[Tensor, Tensor]:
    refusal = triton_refuses(logits)
    if refusal is None and logits.dtype == torch.float64:
        refusal = "no kernel takes fp64"
    if refusal is not None:
        say_once(logger, f"cross entropy runs in PyTorch, slower than by its kernel: {refusal}")
        return cross_entropy_reference(logits, targets, gradient)
    from fourfold.kernels.cross_entropy_triton import cross_entropy_triton

    return cross_entropy_triton(logits, targets, gradient)


def _fake(logits: Tensor, _targets: Tensor, _gradient: bool) -> tuple[Tensor, Tensor]:
    rows = logits.shape[0]
    loss_dtype = torch.promote_types(logits.dtype, torch.float32)
    return logits.new_empty(rows, dtype=loss_dtype), logits.new_empty(rows, dtype=torch.bool)


torch.library.impl("fourfold::cross_entropy_", "default", cross_entropy_reference)
torch.library.impl("fourfold::cross_entropy_", "cuda", _cuda)
torch.library.register_fake("fourfold::cross_entropy_", _fake)
