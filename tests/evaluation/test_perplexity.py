from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fourfold.errors import ConfigError, DataError
from fourfold.evaluation import perplexity

TEXT = "Paid Nordwind 1,249.50 euros on 7 March 2024 for 3 items. The capital of France is Paris. " * 3


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)


def negative_log_likelihoods(model: Any, ids: list[int]) -> list[float]:
    """Of each token but the first, in float64, without the library's loss."""
    with torch.no_grad():
        logits = model.eval()(torch.tensor([ids])).logits[0].double()
    logs = logits - logits.exp().sum(-1, keepdim=True).log()
    return [-float(logs[position, ids[position + 1]]) for position in range(len(ids) - 1)]


def test_one_window_is_the_models_own_loss(model: Any, tiny_tokenizer: Any) -> None:
    ids = torch.tensor([tiny_tokenizer(TEXT)["input_ids"]])
    result = perplexity(model, tiny_tokenizer, TEXT, max_length=1024)
    with torch.no_grad():
        expected = float(model.eval()(ids, labels=ids).loss)
    assert result.loss == pytest.approx(expected, rel=1e-6)  # the library's loss is taken in float32
    assert result.value == math.exp(result.loss)
    assert result.num_tokens == ids.shape[1] - 1


@pytest.mark.parametrize("max_tokens", [40, 41, 33, 2])
@pytest.mark.parametrize(
    ("max_length", "stride", "batch_size"), [(16, 8, 1), (16, 8, 3), (16, 15, 2), (16, 5, 2), (2, 1, 8)]
)
def test_windows_score_each_token_once_as_a_plain_loop_does(
    model: Any, tiny_tokenizer: Any, max_tokens: int, max_length: int, stride: int, batch_size: int
) -> None:
    ids = tiny_tokenizer(TEXT)["input_ids"][:max_tokens]
    losses: dict[int, float] = {}
    start = 0
    while True:
        window = ids[start : start + max_length]
        for position, loss in enumerate(negative_log_likelihoods(model, window), start=start + 1):
            losses.setdefault(position, loss)
        if start + max_length >= len(ids):
            break
        start += stride
    result = perplexity(
        model,
        tiny_tokenizer,
        TEXT,
        max_length=max_length,
        stride=stride,
        batch_size=batch_size,
        max_tokens=max_tokens,
    )
    assert result.num_tokens == len(losses) == len(ids) - 1
    assert result.loss == pytest.approx(math.fsum(losses.values()) / len(losses), rel=1e-12)


def test_progress_ends_with_all_windows_and_the_mode_is_kept(model: Any, tiny_tokenizer: Any) -> None:
    model.train()
    seen: list[tuple[int, int]] = []
    perplexity(
        model,
        tiny_tokenizer,
        TEXT,
        max_length=32,
        stride=16,
        batch_size=2,
        on_progress=lambda done, total: seen.append((done, total)),
    )
    assert seen[-1][0] == seen[-1][1] > 2
    assert model.training


@pytest.mark.parametrize("wrong", [{"max_length": 1}, {"stride": 0}, {"stride": 1024}, {"batch_size": 0}])
def test_options_that_are_not_allowed_are_named(model: Any, tiny_tokenizer: Any, wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match=f"key {next(iter(wrong))}"):
        perplexity(model, tiny_tokenizer, TEXT, **wrong)


@pytest.mark.parametrize("text", ["", "a"])
def test_a_text_of_one_token_is_refused(model: Any, tiny_tokenizer: Any, text: str) -> None:
    with pytest.raises(DataError, match="too short"):
        perplexity(model, tiny_tokenizer, text)
