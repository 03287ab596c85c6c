"""Losses over the log-probabilities of whole answers. A new one is a function and a row of a table.

Written r = log p(answer) - log p_ref(answer), with the policy's p and the reference's p_ref, r+ and r- for the chosen
and the rejected answer of a pair, and d = r+ - r-. All tensors are [pairs] or [answers], in fp32 (fp64 for a model in
fp64). Names and meanings are those of TRL.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = ["DPO_LOSSES", "KTO_LOSSES", "Pairs", "odds_ratio_loss"]


@dataclass(frozen=True)
class Pairs:
    """Log-probabilities of the answers of pairs, summed over their tokens.

    Attributes:
        chosen, rejected: By the policy, [pairs], differentiable.
        ref_chosen, ref_rejected: By the reference, [pairs].
        chosen_tokens, rejected_tokens: Tokens that were summed over, [pairs], as floats.
        beta: Scale of the differences.
        smoothing: Share of pairs that are the wrong way round.
    """

    chosen: Tensor
    rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    beta: float = 0.1
    smoothing: float = 0.0

    @property
    def good(self) -> Tensor:
        """r+"""
        return self.chosen - self.ref_chosen

    @property
    def bad(self) -> Tensor:
        """r-"""
        return self.rejected - self.ref_rejected

    @property
    def difference(self) -> Tensor:
        """d"""
        return self.good - self.bad

    @property
    def mean_difference(self) -> Tensor:
        """The difference of r+ and r- for a token each."""
        return self.good / self.chosen_tokens.clamp(min=1) - self.bad / self.rejected_tokens.clamp(min=1)


def _sigmoid(pairs: Pairs) -> Tensor:
    """-log s(beta d): DPO, https://arxiv.org/abs/2305.18290, equation 7."""
    return -logsigmoid(pairs.beta * pairs.difference)


def _hinge(pairs: Pairs) -> Tensor:
    """max(0, 1 - beta d): SLiC, https://arxiv.org/abs/2305.10425."""
    return torch.relu(1 - pairs.beta * pairs.difference)


def _ipo(pairs: Pairs) -> Tensor:
    """(d - 1 / (2 beta))^2 with d for a token: IPO, https://arxiv.org/abs/2310.12036, equation 17."""
    return (pairs.mean_difference - 1 / (2 * pairs.beta)) ** 2


def _exo_pair(pairs: Pairs) -> Tensor:
    """KL of s(beta d) from the smoothed preference: EXO, https://arxiv.org/abs/2402.00856, equation 16."""
    scaled, share = pairs.beta * pairs.difference, pairs.smoothing
    right = scaled.sigmoid() * (logsigmoid(scaled) - math.log1p(-share))
    wrong = (-scaled).sigmoid() * (logsigmoid(-scaled) - math.log(share))
    return right + wrong


def _nca_pair(pairs: Pairs) -> Tensor:
    """-log s(r+) - (log s(-r+) + log s(-r-)) / 2, scaled by beta: NCA, https://arxiv.org/abs/2402.05369."""
    good, bad = pairs.beta * pairs.good, pairs.beta * pairs.bad
    return -logsigmoid(good) - 0.5 * logsigmoid(-good) - 0.5 * logsigmoid(-bad)


def _robust(pairs: Pairs) -> Tensor:
    """The unbiased loss under flipped labels: robust DPO, https://arxiv.org/abs/2403.00409."""
    scaled, share = pairs.beta * pairs.difference, pairs.smoothing
    return (share * logsigmoid(-scaled) - (1 - share) * logsigmoid(scaled)) / (1 - 2 * share)


def _bco_pair(pairs: Pairs) -> Tensor:
    """-log s(beta r+) - log s(-beta r-): BCO, https://arxiv.org/abs/2404.04656, without its moving mean."""
    return -logsigmoid(pairs.beta * pairs.good) - logsigmoid(-pairs.beta * pairs.bad)


def _sppo_hard(pairs: Pairs) -> Tensor:
    """(r+ - 1 / (2 beta))^2 + (r- + 1 / (2 beta))^2: SPPO, https://arxiv.org/abs/2405.00675, with p = 1."""
    return (pairs.good - 0.5 / pairs.beta) ** 2 + (pairs.bad + 0.5 / pairs.beta) ** 2


def _aot(pairs: Pairs) -> Tensor:
    """Both answers' log-ratios sorted: AOT, https://arxiv.org/abs/2406.05882."""
    ours, reference = pairs.chosen - pairs.rejected, pairs.ref_chosen - pairs.ref_rejected
    return _smoothed(pairs, ours.sort().values - reference.sort().values)


def _aot_unpaired(pairs: Pairs) -> Tensor:
    """r+ and r- sorted, each by itself: AOT unpaired, https://arxiv.org/abs/2406.05882."""
    return _smoothed(pairs, pairs.good.sort().values - pairs.bad.sort().values)


def _smoothed(pairs: Pairs, difference: Tensor) -> Tensor:
    scaled, share = pairs.beta * difference, pairs.smoothing
    return -(1 - share) * logsigmoid(scaled) - share * logsigmoid(-scaled)


def _apo_zero(pairs: Pairs) -> Tensor:
    """1 - s(beta r+) + s(beta r-): APO-zero, https://arxiv.org/abs/2408.06266, equation 7."""
    return 1 - (pairs.beta * pairs.good).sigmoid() + (pairs.beta * pairs.bad).sigmoid()


def _apo_down(pairs: Pairs) -> Tensor:
    """s(beta r+) + 1 - s(beta d): APO-down, https://arxiv.org/abs/2408.06266, equation 8."""
    return (pairs.beta * pairs.good).sigmoid() + 1 - (pairs.beta * pairs.difference).sigmoid()


def _sft(pairs: Pairs) -> Tensor:
    """Cross entropy of the chosen answers for a token of the batch: a weight beside another loss (RPO, MPO)."""
    return (-pairs.chosen.sum() / pairs.chosen_tokens.sum().clamp(min=1)).expand(len(pairs.chosen))


def _sigmoid_norm(pairs: Pairs) -> Tensor:
    """-log s(beta d) with d for a token: length-normalized DPO, https://arxiv.org/abs/2411.15124."""
    return -logsigmoid(pairs.beta * pairs.mean_difference)


# TRL's `loss_type` -> the loss of each pair
DPO_LOSSES: dict[str, Callable[[Pairs], Tensor]] = {
    "sigmoid": _sigmoid,
    "hinge": _hinge,
    "ipo": _ipo,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "robust": _robust,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "sft": _sft,
    "sigmoid_norm": _sigmoid_norm,
}


def _kto(ratios: Tensor, sign: Tensor, kl: Tensor, beta: float) -> Tensor:
    """1 - s(beta (r - z)) of a good answer, 1 - s(beta (z - r)) of a bad one: KTO, https://arxiv.org/abs/2402.01306."""
    return 1 - (beta * sign * (ratios - kl)).sigmoid()


def _apo_zero_unpaired(ratios: Tensor, sign: Tensor, _kl: Tensor, beta: float) -> Tensor:
    """The same without z: APO-zero of single answers, https://arxiv.org/abs/2408.06266."""
    return 1 - (beta * sign * ratios).sigmoid()


# TRL's `loss_type` -> the loss of each answer, from r, 1 or -1 for good or bad, the estimate z of the KL, and beta
KTO_LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor, float], Tensor]] = {
    "kto": _kto,
    "apo_zero_unpaired": _apo_zero_unpaired,
}


def odds_ratio_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """-log s(log odds+ - log odds-) of answers of log-probability `chosen`, `rejected` for a token, [pairs].

    odds = p / (1 - p): ORPO, https://arxiv.org/abs/2403.07691, equations 4 and 7.
    """

    def log_odds(log_p: Tensor) -> Tensor:
        # log(1 - exp(x)), by whichever of the two forms keeps its digits (Maechler 2012). Each is given only what it
        # is good for: where the other is taken, its gradient must be a number to be multiplied by 0.
        half = -math.log(2)
        near = torch.log(-torch.expm1(log_p.clamp(min=half)))
        far = torch.log1p(-torch.exp(log_p.clamp(max=half)))
        return log_p - torch.where(log_p > half, near, far)

    return -logsigmoid(log_odds(chosen) - log_odds(rejected))
