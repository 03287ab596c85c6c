from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from fourfold.errors import ConfigError
from fourfold.inference.sampling import RowSampling, SamplingOptions, gumbel_noise, processed_logits, sample

VOCAB = 200


def transformers_scores(options: SamplingOptions, input_ids: Tensor, logits: Tensor) -> Tensor:
    """What Transformers' own processors make of a row, in the order of `generate`."""
    processors = LogitsProcessorList()
    if options.logit_bias:
        processors.append(SequenceBiasLogitsProcessor([[[token], bias] for token, bias in options.logit_bias]))
    if options.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(options.repetition_penalty))
    if options.temperature > 0:
        processors.append(TemperatureLogitsWarper(options.temperature))
        if options.top_k:
            processors.append(TopKLogitsWarper(options.top_k))
        if options.top_p < 1:
            processors.append(TopPLogitsWarper(options.top_p))
        if options.min_p:
            processors.append(MinPLogitsWarper(options.min_p))
    return processors(input_ids[None], logits[None].clone())[0]


MIXED = [
    SamplingOptions(),
    SamplingOptions(temperature=0.7),
    SamplingOptions(temperature=1.3, top_k=7),
    SamplingOptions(temperature=1.0, top_p=0.8),
    SamplingOptions(temperature=0.5, min_p=0.1),
    SamplingOptions(repetition_penalty=1.4),
    SamplingOptions(temperature=1.1, top_k=40, top_p=0.6, min_p=0.05, repetition_penalty=0.8),
    SamplingOptions(temperature=2.0, top_k=10_000, top_p=0.95),
    SamplingOptions(temperature=1.0, top_p=1e-6),
    SamplingOptions(temperature=1.0, min_p=1.0),
    SamplingOptions(temperature=1.0, top_k=1),
    SamplingOptions(logit_bias=((3, 100.0), (7, -100.0))),
    SamplingOptions(temperature=0.9, top_k=30, repetition_penalty=1.3, logit_bias=tuple((i, 4.0) for i in range(50))),
]


@pytest.mark.parametrize("seed", range(5))
def test_each_row_of_a_batch_is_filtered_as_by_transformers(seed: int) -> None:
    torch.manual_seed(seed)
    logits = 3 * torch.randn(len(MIXED), VOCAB)
    input_ids = torch.randint(VOCAB, (len(MIXED), 30))
    seen = torch.zeros(len(MIXED), VOCAB, dtype=torch.bool).scatter(1, input_ids, True)
    scores = processed_logits(logits, RowSampling.of(MIXED), seen)
    for row, options in enumerate(MIXED):
        wanted = transformers_scores(options, input_ids[row], logits[row])
        assert torch.equal(scores[row].isfinite(), wanted.isfinite()), options
        torch.testing.assert_close(scores[row], wanted)


def test_penalties_of_frequency_and_presence_are_openais() -> None:
    """As its documentation defines them: mu[j] - c[j] * frequency - (c[j] > 0) * presence."""
    torch.manual_seed(3)
    asked = [(0.0, 0.0), (0.7, 0.0), (0.0, 1.5), (-2.0, 0.3)]
    options = [SamplingOptions(frequency_penalty=frequency, presence_penalty=presence) for frequency, presence in asked]
    logits = 3 * torch.randn(len(asked), VOCAB)
    answers = torch.randint(20, (len(asked), 40))
    counts = torch.stack([answer.bincount(minlength=VOCAB) for answer in answers]).to(torch.int32)
    scores = processed_logits(logits, RowSampling.of(options), counts=counts)
    for row, (frequency, presence) in enumerate(asked):
        times = [answers[row].tolist().count(token) for token in range(VOCAB)]
        wanted = [
            logit - times[token] * frequency - (presence if times[token] else 0)
            for token, logit in enumerate(logits[row].tolist())
        ]
        torch.testing.assert_close(scores[row], torch.tensor(wanted))


def test_no_bias_brings_back_what_is_not_allowed() -> None:
    allowed = torch.ones(1, VOCAB, dtype=torch.bool)
    allowed[0, 5] = False
    rows = RowSampling.of([SamplingOptions(logit_bias=((5, 100.0), (8, 50.0)))])
    assert sample(torch.zeros(1, VOCAB), rows, torch.zeros(1, dtype=torch.int64), allowed=allowed).item() == 8


@pytest.mark.parametrize("options", [MIXED[1], MIXED[3], MIXED[6]])
def test_draws_follow_the_distribution(options: SamplingOptions) -> None:
    torch.manual_seed(1)
    logits = 2 * torch.randn(VOCAB)
    input_ids = torch.arange(20)
    seen = torch.zeros(1, VOCAB, dtype=torch.bool)
    seen[0, :20] = True
    wanted = transformers_scores(options, input_ids, logits).softmax(dim=0)
    count = 40_000
    rows = RowSampling.of([SamplingOptions(**{**vars(options), "seed": 3})])
    drawn = sample(logits.expand(count, -1), rows, torch.arange(count), seen)
    assert not wanted[drawn].eq(0).any()
    # Pearson's test over tokens that are expected often enough, the rest together; 5 standard deviations.
    often = wanted * count >= 5
    observed = drawn.bincount(minlength=VOCAB)[often].double()
    expected = (wanted * count)[often].double()
    rest = count - expected.sum()
    statistic = ((observed - expected) ** 2 / expected).sum() + (count - observed.sum() - rest) ** 2 / rest.clamp(min=1)
    freedom = int(often.sum())
    assert statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_draws_at_neighbouring_seeds_and_positions_are_independent() -> None:
    seeds = torch.arange(200)[:, None]
    noise = gumbel_noise(seeds, torch.zeros_like(seeds), 500)
    other = gumbel_noise(torch.zeros_like(seeds), seeds, 500)
    for values in (noise, other):
        uniform = torch.exp(-torch.exp(-values.double()))
        assert abs(uniform.mean().item() - 0.5) < 0.005
        assert abs(uniform.var().item() - 1 / 12) < 0.002
        correlations = torch.corrcoef(uniform)
        correlations.fill_diagonal_(0)
        assert correlations.abs().max() < 0.25  # of 19,900 pairs of 500: 5.6 standard deviations
    assert not torch.equal(noise[1:], other[1:])


def test_a_seed_draws_the_same_whatever_shares_the_batch() -> None:
    torch.manual_seed(2)
    logits = torch.randn(len(MIXED), VOCAB)
    seen = torch.rand(len(MIXED), VOCAB) < 0.2
    positions = torch.arange(10, 10 + len(MIXED))
    together = sample(logits, RowSampling.of(MIXED), positions, seen)
    for row, options in enumerate(MIXED):
        alone = sample(logits[row, None], RowSampling.of([options]), positions[row, None], seen[row, None])
        assert alone.item() == together[row]
    assert together[0] == logits[0].argmax()


def test_seed_and_position_both_matter() -> None:
    logits = torch.zeros(64, VOCAB)
    same = RowSampling.of([SamplingOptions(temperature=1.0, seed=5)])
    assert len(set(sample(logits, same, torch.arange(64)).tolist())) > 30
    seeds = RowSampling.of([SamplingOptions(temperature=1.0, seed=seed) for seed in range(-32, 32)])
    assert len(set(sample(logits, seeds, torch.zeros(64, dtype=torch.int64)).tolist())) > 30


def test_only_allowed_tokens_are_drawn() -> None:
    allowed = torch.zeros(2, VOCAB, dtype=torch.bool)
    allowed[:, 17] = True
    logits = torch.randn(2, VOCAB)
    rows = RowSampling.of([SamplingOptions(), SamplingOptions(temperature=5.0, top_p=0.5)])
    assert sample(logits, rows, torch.zeros(2, dtype=torch.int64), allowed=allowed).tolist() == [17, 17]


@pytest.mark.parametrize("options", [SamplingOptions(), SamplingOptions(temperature=1.0, top_p=0.9)])
def test_a_row_without_a_choice_gives_none_and_leaves_the_others(options: SamplingOptions) -> None:
    logits = torch.randn(3, VOCAB)
    logits[0] = float("nan")
    allowed = torch.ones(3, VOCAB, dtype=torch.bool)
    allowed[1] = False
    tokens = sample(logits, RowSampling.of([options] * 3), torch.arange(3), allowed=allowed)
    alone = sample(logits[2:], RowSampling.of([options]), torch.tensor([2]))
    assert tokens.tolist() == [-1, -1, alone.item()]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"frequency_penalty": float("nan")},
        {"presence_penalty": float("inf")},
        {"logit_bias": ((-1, 1.0),)},
        {"logit_bias": ((3, 1.0), (3, 2.0))},
        {"logit_bias": ((3, float("-inf")),)},
        {"seed": 2**63},
    ],
)
def test_options_that_are_not_allowed_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"key {next(iter(wrong))}"):
        SamplingOptions(**wrong)
