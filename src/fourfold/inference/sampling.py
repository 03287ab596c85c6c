"""Choosing the next tokens of many sequences at a time, on the device that holds their logits.

Each row has parameters of its own, as tensors, and nothing is read back, so that all of it can be captured in a CUDA
graph. The order is that of Transformers: bias, repetition penalty, temperature, top-k, top-p, min-p; OpenAI's penalties
come behind the repetition penalty, as in vLLM.

A token is drawn by the Gumbel-max trick: the largest of logit + noise. The noise of a token is a function of the
request's seed, the position and the token alone. So what is drawn depends neither on the rows beside it nor on which
filters these ask for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor

from fourfold.errors import ConfigError
from fourfold.inference.transfers import to_device

__all__ = ["RowSampling", "SamplingOptions", "gumbel_noise", "processed_logits", "sample"]

# Multipliers of splitmix64 (Steele, Lea, Flood, 2014), as signed numbers of 64 bits.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64

# The next float below 1.
_BELOW_ONE = 1.0 - 2.0**-24


@dataclass(frozen=True)
class SamplingOptions:
    """How a request's tokens are chosen.

    Args:
        temperature: 0 takes the likeliest token each time.
        top_k: Only the k likeliest; 0 for all.
        top_p: Only the likeliest that together have this share of probability.
        min_p: Only what is at least this share as likely as the likeliest.
        repetition_penalty: What logits of tokens in the prompt or the answer are divided by (multiplied where
            negative; Keskar et al., 2019).
        frequency_penalty: What is taken off a token's logit for each time that the answer has it (OpenAI's definition:
            the prompt does not count).
        presence_penalty: What is taken off once, for every token that the answer has.
        logit_bias: Tokens, and what is added to the logit of each.
        seed: The same seed and prompt give the same answer.

    Raises:
        ConfigError: A value that is not allowed.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int = 0

    @property
    def counts_tokens(self) -> bool:
        """Whether what the answer has so far makes a difference."""
        return self.frequency_penalty != 0 or self.presence_penalty != 0

    def __post_init__(self) -> None:
        # Written so that NaN is refused, too.
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError("key temperature", found=self.temperature, allowed="0 (greedy) or above")
        if self.top_k < 0:
            raise ConfigError("key top_k", found=self.top_k, allowed="0 (all) or above")
        if not 0 < self.top_p <= 1:
            raise ConfigError("key top_p", found=self.top_p, allowed="above 0, up to 1")
        if not 0 <= self.min_p <= 1:
            raise ConfigError("key min_p", found=self.min_p, allowed="0 to 1")
        if not 0 < self.repetition_penalty < float("inf"):
            raise ConfigError("key repetition_penalty", found=self.repetition_penalty, allowed="above 0; 1 for none")
        for key in ("frequency_penalty", "presence_penalty"):
            if not isfinite(getattr(self, key)):
                raise ConfigError(f"key {key}", found=getattr(self, key), allowed="a number; 0 for none")
        tokens = [token for token, _ in self.logit_bias]
        if len(set(tokens)) < len(tokens) or min(tokens, default=0) < 0:
            raise ConfigError("key logit_bias", found=tokens, allowed="token ids of 0 and above, each once")
        if not all(isfinite(bias) for _, bias in self.logit_bias):
            raise ConfigError("key logit_bias", found=self.logit_bias, allowed="a number for each token")
        if not -(2**63) <= self.seed < 2**63:
            raise ConfigError("key seed", found=self.seed, allowed="a number of 64 bits")


@dataclass(frozen=True)
class RowSampling:
    """The options of the rows of a batch, as tensors; and which of them any row asks for, as plain numbers.

    Attributes:
        temperature, top_p, min_p, repetition_penalty, frequency_penalty, presence_penalty: fp32 [rows, 1].
        top_k, seed: int64 [rows, 1].
        biases: Row, token (int64) and bias (fp32) [biases] of each that a row has; None where none has one.
        draws: Whether any row has a temperature.
        most_k: The largest top_k there is; 0 where no row has one.
        has_top_p, has_min_p, has_penalty: Whether any row has one, of penalties that for repetition.
        has_counts: Whether any row has a penalty by what its answer has.
    """

    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor
    repetition_penalty: Tensor
    frequency_penalty: Tensor
    presence_penalty: Tensor
    seed: Tensor
    biases: tuple[Tensor, Tensor, Tensor] | None
    draws: bool
    most_k: int
    has_top_p: bool
    has_min_p: bool
    has_penalty: bool
    has_counts: bool

    @classmethod
    def of(cls, rows: Sequence[SamplingOptions], device: torch.device | str = "cpu") -> RowSampling:
        """Those of these rows."""

        def columns(names: tuple[str, ...], dtype: torch.dtype) -> Iterator[Tensor]:
            # Copied together.
            values = [[[getattr(row, name)] for row in rows] for name in names]
            return iter(to_device(values, dtype, device).unbind())

        drawn = [row for row in rows if row.temperature > 0]
        temperature, top_p, min_p, repetition, frequency, presence = columns(
            ("temperature", "top_p", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"),
            torch.float32,
        )
        top_k, seed = columns(("top_k", "seed"), torch.int64)
        biases = None
        if named := [(index, *bias) for index, row in enumerate(rows) for bias in row.logit_bias]:
            of_row, of_token, by = map(list, zip(*named, strict=True))
            biases = (*to_device([of_row, of_token], torch.int64, device), to_device(by, torch.float32, device))
        return cls(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition,
            frequency_penalty=frequency,
            presence_penalty=presence,
            seed=seed,
            biases=biases,
            draws=bool(drawn),
            most_k=max((row.top_k for row in drawn), default=0),
            has_top_p=any(row.top_p < 1 for row in drawn),
            has_min_p=any(row.min_p > 0 for row in drawn),
            has_penalty=any(row.repetition_penalty != 1 for row in rows),
            has_counts=any(row.counts_tokens for row in rows),
        )


def sample(
    logits: Tensor,
    rows: RowSampling,
    positions: Tensor,
    seen: Tensor | None = None,
    allowed: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """The next token of each row.

    Args:
        logits: [rows, vocab], of any floating type.
        rows: How each is sampled.
        positions: int64 [rows], where the token will stand.
        seen: bool [rows, vocab], the tokens so far; needed where a row has a repetition penalty.
        allowed: bool [rows, vocab], what may come; None for everything.
        counts: int32 [rows, vocab], how often the answer has a token; needed where a row has a penalty for that.

    Returns:
        int64 [rows]; -1 where no token can be chosen: a logit is NaN, or nothing is allowed.
    """
    scores = processed_logits(logits, rows, seen, allowed, counts)
    if rows.draws:
        noise = gumbel_noise(rows.seed, positions[:, None], scores.shape[1])
        scores = torch.where(rows.temperature > 0, scores + noise, scores)
    best, tokens = scores.max(dim=1)
    return torch.where(best > float("-inf"), tokens, -1)


def processed_logits(
    logits: Tensor,
    rows: RowSampling,
    seen: Tensor | None = None,
    allowed: Tensor | None = None,
    counts: Tensor | None = None,
) -> Tensor:
    """Logits [rows, vocab] in fp32 as a draw takes them: biased, penalized, divided by the temperature, -inf where
    filtered.

    Rows without a temperature are biased and penalized only.
    """
    scores = logits.float()
    if allowed is not None:
        scores = scores.masked_fill(~allowed, float("-inf"))
    if rows.biases is not None:
        row, token, bias = rows.biases
        scores = scores.index_put((row, token), scores[row, token] + bias)
    if rows.has_penalty and seen is not None:
        penalty = rows.repetition_penalty
        scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    if rows.has_counts and counts is not None:
        scores = scores - rows.frequency_penalty * counts - rows.presence_penalty * (counts > 0)
    if not rows.draws:
        return scores
    greedy = rows.temperature == 0
    scores = scores / torch.where(greedy, 1.0, rows.temperature)
    filtered = scores
    vocab = scores.shape[1]
    if rows.most_k:
        likeliest = filtered.topk(min(rows.most_k, vocab), dim=1).values
        least = likeliest.gather(1, (rows.top_k.clamp(1, vocab) - 1).clamp(max=likeliest.shape[1] - 1))
        filtered = filtered.masked_fill((filtered < least) & (rows.top_k > 0), float("-inf"))
    if rows.has_top_p:
        ordered, order = filtered.sort(dim=1, descending=True)
        shares = ordered.softmax(dim=1)
        # A token goes if those before it have the share already; the likeliest never does.
        gone = (shares.cumsum(dim=1) - shares >= rows.top_p) & (rows.top_p < 1)
        gone[:, 0] = False
        filtered = filtered.masked_fill(torch.zeros_like(gone).scatter(1, order, gone), float("-inf"))
    if rows.has_min_p:
        least = filtered.max(dim=1, keepdim=True).values + rows.min_p.log()
        filtered = filtered.masked_fill(filtered < least, float("-inf"))
    return torch.where(greedy, scores, filtered)


def gumbel_noise(seed: Tensor, position: Tensor, vocab: int) -> Tensor:
    """Gumbel noise fp32 [rows, vocab] that is a function of seed, position (int64 [rows, 1]) and token.

    Counters through splitmix64's mixing function; 32 bits of it make a uniform number u, and -log(-log(1 - u)) is what
    decides: the winner's u is small, where floats lie close.
    """
    row = _mix(_mix(seed * _GOLDEN + 1) + position * _GOLDEN)
    token = torch.arange(vocab, device=seed.device)
    bits = _mix(row + token * _GOLDEN) & 0xFFFFFFFF
    uniform = ((bits.to(torch.float32) + 0.5) * 2.0**-32).clamp(max=_BELOW_ONE)
    return -torch.log(-torch.log1p(-uniform))


def _mix(number: Tensor) -> Tensor:
    """splitmix64's: each bit of the result depends on all bits of the number. int64, whose products wrap around."""
    number = (number ^ _shifted(number, 30)) * _FIRST
    number = (number ^ _shifted(number, 27)) * _SECOND
    return number ^ _shifted(number, 31)


def _shifted(number: Tensor, bits: int) -> Tensor:
    """To the right, with zeros from the left."""
    return (number >> bits) & ((1 << (64 - bits)) - 1)
