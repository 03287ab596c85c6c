from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fourfold.errors import ConfigError, DataError
from fourfold.evaluation import COMPARISONS, exact_match
from fourfold.inference import GenerationOptions, generate_replies

OPTIONS = GenerationOptions(max_new_tokens=12, batch_size=2)


def same(normalise: str, answer: str, reference: str) -> bool:
    read = COMPARISONS[normalise]
    expected = read(reference)
    try:
        return read(answer) == expected
    except ValueError:
        return False


@pytest.mark.parametrize(
    ("normalise", "answer", "reference", "expected"),
    [
        ("strip", " Paris\n", "Paris", True),
        ("strip", "paris", "Paris", False),
        ("json", '{"b": [1, 2], "a": "x"}', '{"a":"x","b":[1,2]}', True),
        ("json", '{"a": 1249.50}', '{"a": 1249.5}', True),
        ("json", '{"a": 1.0}', '{"a": 1}', True),
        ("json", '{"a": true}', '{"a": 1}', False),
        ("json", '{"a": [false]}', '{"a": [0]}', False),
        ("json", '{"a": "1"}', '{"a": 1}', False),
        ("json", '{"a": null}', "{}", False),
        ("json", "[1, 2]", "[2, 1]", False),
        ("json", '{"a": 0.1000000000000000055}', '{"a": 0.1}', False),
        ("json", 'Here: {"a": 1}', '{"a": 1}', False),
        ("json", '{"a": 1} done', '{"a": 1}', False),
        ("json", '{"a": 1, "a": 1}', '{"a": 1}', False),
        ("json", "{'a': 1}", '{"a": 1}', False),
        ("json", "NaN", "1", False),
        ("json", "[" * 100_000, "1", False),
        ("number", "2 + 2 = 4\n#### 4", "so\n#### 4", True),
        ("number", "#### $1,234.50", "#### 1234.5", True),
        ("number", "#### -3", "#### 3", False),
        ("number", "#### 1 or 2", "#### 2", True),
        ("number", "the answer is 4", "#### 4", False),
        ("number", "4 ####", "#### 4", False),
    ],
)
def test_answers_are_compared(normalise: str, answer: str, reference: str, expected: bool) -> None:
    assert same(normalise, answer, reference) is expected


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def test_the_score_counts_rows_whose_generated_answer_is_the_reference(model: Any, tokenizer: Any) -> None:
    prompts = [[{"role": "user", "content": text}] for text in ("Hi", "Who are you?", "Paid 3 euros.")]
    replies = generate_replies(model, tokenizer, prompts, OPTIONS)
    references = [replies[0], "something else", replies[2]]
    conversations = [
        [*prompt, {"role": "assistant", "content": reference}]
        for prompt, reference in zip(prompts, references, strict=True)
    ]
    result = exact_match(model, tokenizer, conversations, OPTIONS)
    assert (result.num_correct, result.num_rows, result.score) == (2, 3, 2 / 3)
    assert [sample.correct for sample in result.samples] == [True, False, True]
    assert [sample.answer for sample in result.samples] == replies
    assert [sample.expected for sample in result.samples] == references
    assert [sample.prompt for sample in result.samples] == prompts


def test_what_cannot_be_compared_is_named_with_its_row(model: Any, tokenizer: Any) -> None:
    user = {"role": "user", "content": "Hi"}
    good = [user, {"role": "assistant", "content": "{}"}]
    with pytest.raises(ConfigError, match="key normalise"):
        exact_match(model, tokenizer, [good], OPTIONS, "fuzzy")
    with pytest.raises(DataError, match="no rows"):
        exact_match(model, tokenizer, [], OPTIONS)
    with pytest.raises(DataError, match="row 2: the last turn is not the assistant's"):
        exact_match(model, tokenizer, [good, [user]], OPTIONS)
    broken = [user, {"role": "assistant", "content": "{"}]
    with pytest.raises(DataError, match="row 2: the reference cannot be compared as 'json'"):
        exact_match(model, tokenizer, [good, broken], OPTIONS, "json")


@pytest.mark.parametrize(
    ("pattern", "normalise", "answer", "reference", "expected"),
    [
        (r"answer is (\w+)", "strip", "I think the answer is A. No: the answer is B.", "B", True),
        (r"answer is (\w+)", "strip", "The answer is A", "So the answer is A!", True),
        (r"answer is (\w+)", "strip", "B", "B", False),
        (r"\d+", "strip", "first 3, then 12.", "12", True),
        (r"\{.*\}", "json", 'Here it is: {"a": 1.0} done', '{"a": 1}', True),
        (r"a(b)?", "strip", "a", "ab", False),
    ],
)
def test_a_pattern_takes_out_of_an_answer_what_is_compared(
    monkeypatch, pattern: str, normalise: str, answer: str, reference: str, expected: bool
) -> None:
    module = importlib.import_module("fourfold.evaluation.exact_match")
    monkeypatch.setattr(module, "generate_replies", lambda *_: [answer])
    rows = [[{"role": "user", "content": "?"}, {"role": "assistant", "content": reference}]]
    assert exact_match(None, None, rows, OPTIONS, normalise, pattern).samples[0].correct is expected


def test_a_pattern_that_some_references_lack_is_told_and_so_is_one_that_is_none() -> None:
    rows = [[{"role": "assistant", "content": text}] for text in ("the answer is A", "B")]
    with pytest.raises(DataError, match=r"row 2: the reference(.|\n)*does not match"):
        exact_match(None, None, rows, OPTIONS, pattern=r"answer is (\w)")
    with pytest.raises(ConfigError, match="no regular expression"):
        exact_match(None, None, rows, OPTIONS, pattern="(")
