"""Whether an exported model predicts what the trained one does: KL, likeliest tokens, tokenizer, template, stops."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fourfold.errors import VerificationError
from fourfold.export.verification import compare_logits

__all__ = ["Agreement", "Bounds", "agreement", "agreement_of_likeliest", "require_same_texts"]

_TEXTS = (
    "Paid Nordwind 1,249.50 euros on 7 March 2024, didn't we?\n\n  Yes:\t3 items.",
    "我们在2024年支付了 €41,20 — naïve café, Привет, עברית. 🦙🚀",
    "def f(x):\n    return x**2 + 10 * x  # 12345678\n\n\n",
)


@dataclass(frozen=True)
class Bounds:
    """What is let stand.

    Args:
        kl: Largest mean KL, nats a token.
        top1: Smallest share of positions with the same likeliest token.
    """

    kl: float
    top1: float


@dataclass(frozen=True)
class Agreement:
    """Predictions of an exported model against those of the trained one.

    Args:
        num_texts: Texts compared.
        num_tokens: Positions compared.
        mean_kl: Mean over positions of KL(trained || exported), in nats.
        max_kl: The largest of them.
        top1_agreement: Share of positions whose likeliest token is the same.
    """

    num_texts: int
    num_tokens: int
    mean_kl: float
    max_kl: float
    top1_agreement: float

    def require(self, bounds: Bounds, what: str) -> None:
        """Raise VerificationError unless both are kept."""
        if not (self.mean_kl <= bounds.kl and self.top1_agreement >= bounds.top1):
            raise VerificationError(
                f"{what} does not answer as the trained model does; nothing was written",
                found=f"mean KL {self.mean_kl:.2e} nats (at most {self.max_kl:.2e}), likeliest token the same at "
                f"{self.top1_agreement:.2%} of {self.num_tokens} positions",
                allowed=f"a mean KL of at most {bounds.kl:g}, and {bounds.top1:.2%}",
                hint="choose a finer quantization, or accept it by name with --bound-kl and --bound-top1",
            )


def agreement(reference: Sequence[Tensor], candidate: Sequence[Tensor]) -> Agreement:
    """Compare logits, fp32 [tokens, vocabulary] each, text by text. Rows the file was padded with are left out."""
    cut = [theirs[:, : ours.shape[1]] for ours, theirs in zip(reference, candidate, strict=True)]
    found = compare_logits(reference, cut)
    return Agreement(found.num_texts, found.num_tokens, found.mean_kl, found.max_kl, found.top1_agreement)


def agreement_of_likeliest(
    reference: Sequence[Tensor], candidate: Sequence[Sequence[tuple[Tensor, Tensor]]]
) -> Agreement:
    """The same where of the candidate only the likeliest tokens are known.

    All other tokens count as one, so that the KL is a lower bound of the whole one.

    Args:
        reference: Logits of each text: [tokens, vocabulary].
        candidate: For each position of each text, ids and log-probabilities of its likeliest tokens.
    """
    divergences, same = [], 0
    for logits, positions in zip(reference, candidate, strict=True):
        for row, (ids, log_q) in zip(logits.double().log_softmax(-1), positions, strict=True):
            log_p = row[ids]
            rest_p, rest_q = (float((1 - part.exp().sum()).clamp(min=1e-12)) for part in (log_p, log_q))
            known = float((log_p.exp() * (log_p - log_q)).sum())
            divergences.append(known + rest_p * float(torch.tensor(rest_p / rest_q).log()))
            same += int(row.argmax() == ids[log_q.argmax()])
    return Agreement(
        num_texts=len(reference),
        num_tokens=len(divergences),
        mean_kl=sum(divergences) / len(divergences),
        max_kl=max(divergences),
        top1_agreement=same / len(divergences),
    )


def require_same_texts(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    tokenize: Callable[[str], list[int]],
    reader: str,
) -> dict[str, Any]:
    """Compare the tokens of the prompts, special ones among them, and of texts with digits, scripts and white space.

    Raises:
        VerificationError: A text that becomes other tokens.
    """
    texts = [tokenizer.decode(ids) for ids in prompts] + list(_TEXTS)
    num_tokens = 0
    for text in texts:
        wanted, found = tokenizer(text)["input_ids"], tokenize(text)
        if wanted != found:
            place = next((i for i, pair in enumerate(zip(wanted, found, strict=False)) if pair[0] != pair[1]), -1)
            raise VerificationError(
                f"the exported tokenizer reads a text as other tokens than the model's; nothing was written ({reader})",
                found=f"{found[place : place + 8]} at token {place} of {text[:60]!r}",
                allowed=f"{wanted[place : place + 8]}",
            )
        num_tokens += len(wanted)
    return {"texts": len(texts), "tokens": num_tokens, "same": True}
