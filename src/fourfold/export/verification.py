"""How far the logits of an exported model are from those of the trained one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fourfold.errors import VerificationError

__all__ = ["LogitDifference", "compare_logits", "reference_logits"]


@dataclass(frozen=True)
class LogitDifference:
    """Logits of a candidate against a reference, over all positions of some real texts.

    Args:
        num_texts: Texts compared.
        num_tokens: Positions compared.
        relative_error: ||candidate - reference|| / ||reference||, each logit taken relative to its position's mean (a
            constant added to all logits changes no probability).
        max_abs_difference: The largest difference of one such logit.
        mean_kl: Mean over positions of KL(reference || candidate), in nats.
        top1_agreement: Share of positions whose likeliest token is the same.
        max_kl: The largest KL of one position.
    """

    num_texts: int
    num_tokens: int
    relative_error: float
    max_abs_difference: float
    mean_kl: float
    top1_agreement: float
    max_kl: float

    def require(self, bound: float, what: str, hint: str) -> None:
        """Raise VerificationError unless the relative error is at most `bound`."""
        if not self.relative_error <= bound:
            raise VerificationError(
                f"{what} does not answer as the trained model does; nothing was written",
                found=f"relative error of the logits {self.relative_error:.4f}, mean KL {self.mean_kl:.2e} nats, "
                f"likeliest token the same at {self.top1_agreement:.1%} of {self.num_tokens} positions",
                allowed=f"a relative error of at most {bound}",
                hint=hint,
            )


@torch.inference_mode()
def reference_logits(model: nn.Module, token_ids: Sequence[list[int]]) -> list[Tensor]:
    """The logits of each text: fp32 [tokens, vocabulary] on the CPU."""
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    logits = [
        model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0].float().cpu()
        for ids in token_ids
    ]
    model.train(was_training)
    return logits


def compare_logits(reference: Sequence[Tensor], candidate: Sequence[Tensor]) -> LogitDifference:
    """Compare two lists of logits, fp32 [tokens, vocabulary] each, text by text."""
    squared = reference_squared = kl = largest = largest_kl = 0.0
    tokens = agreeing = 0
    for ours, theirs in zip(reference, candidate, strict=True):
        centred, other = (logits.double() - logits.double().mean(dim=-1, keepdim=True) for logits in (ours, theirs))
        squared += float((other - centred).square().sum())
        reference_squared += float(centred.square().sum())
        largest = max(largest, float((other - centred).abs().max()))
        log_p, log_q = centred.log_softmax(dim=-1), other.log_softmax(dim=-1)
        divergence = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
        kl += float(divergence.sum())
        largest_kl = max(largest_kl, float(divergence.max()))
        agreeing += int((centred.argmax(dim=-1) == other.argmax(dim=-1)).sum())
        tokens += ours.shape[0]
    return LogitDifference(
        num_texts=len(reference),
        num_tokens=tokens,
        relative_error=(squared / reference_squared) ** 0.5,
        max_abs_difference=largest,
        mean_kl=kl / tokens,
        top1_agreement=agreeing / tokens,
        max_kl=largest_kl,
    )
