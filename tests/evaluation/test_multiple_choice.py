from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fourfold.errors import ConfigError, DataError
from fourfold.evaluation.likelihood import continuation_likelihoods
from fourfold.evaluation.multiple_choice import Choice, multiple_choice, parse_choices

pytestmark = pytest.mark.usefixtures("one_quiet_thread")


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    loaded = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    # Far from uniform, so that choices differ.
    with torch.no_grad():
        loaded.lm_head.weight.mul_(20)
    return loaded


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def log_prob(model: Any, ids: list[int], num_scored: int) -> float:
    """One row, without padding, in plain arithmetic."""
    with torch.no_grad():
        log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return sum(float(log_probs[place - 1, ids[place]]) for place in range(len(ids) - num_scored, len(ids)))


def test_a_continuation_has_the_log_probability_of_its_tokens_in_any_batch(model: Any) -> None:
    pairs = [([5], [6, 7, 8]), ([9, 10, 11, 12, 13], [14]), ([15, 16], [17, 18])]
    for batch_size in (1, 3):
        found = continuation_likelihoods(model, pairs, batch_size)
        for likelihood, (before, scored) in zip(found, pairs, strict=True):
            assert likelihood.log_prob == pytest.approx(log_prob(model, before + scored, len(scored)), rel=1e-4)
            assert likelihood.num_tokens == len(scored)


def test_a_continuation_that_greedy_decoding_writes_is_greedy(model: Any) -> None:
    ids = [20, 21, 22]
    written = model.generate(torch.tensor([ids]), max_new_tokens=3, do_sample=False, eos_token_id=None)[0, 3:].tolist()
    other = [written[0], written[1], (written[2] + 1) % 300]
    found = continuation_likelihoods(model, [(ids, written), (ids, other)])
    assert [likelihood.is_greedy for likelihood in found] == [True, False]


def test_what_does_not_fit_loses_its_beginning_and_what_is_empty_is_refused(model: Any) -> None:
    longest = model.config.max_position_embeddings
    before = [index % 300 for index in range(longest + 40)]
    (found,) = continuation_likelihoods(model, [(before, [3, 4])])
    kept = [*before, 3, 4][-(longest + 1) :]
    with torch.no_grad():
        log_probs = model(torch.tensor([kept[:-1]])).logits[0, -2:].log_softmax(-1)
    assert found.log_prob == pytest.approx(float(log_probs[0, 3] + log_probs[1, 4]), rel=1e-4)
    for pair in (([], [1]), ([1], [])):
        with pytest.raises(DataError, match="continuation 2 cannot be scored"):
            continuation_likelihoods(model, [([1], [2]), pair])
    with pytest.raises(ConfigError, match="batch_size"):
        continuation_likelihoods(model, [], 0)


def test_the_likeliest_choice_is_taken_and_by_length_another_one(model: Any, tokenizer: Any) -> None:
    question, choices = "What is the capital of France?", ("Paris", "a helpful assistant", "euros")
    whole = [tokenizer(f"{question} {choice}")["input_ids"] for choice in choices]
    start = len(tokenizer(question)["input_ids"])
    plain = [log_prob(model, ids, len(ids) - start) for ids in whole]
    by_length = [value / len(choice) for value, choice in zip(plain, choices, strict=True)]
    rows = [Choice(question, choices, index) for index in range(3)]
    found = multiple_choice(model, tokenizer, rows, batch_size=4)
    assert found.picked == [(plain.index(max(plain)), by_length.index(max(by_length)))] * 3
    assert (found.acc, found.acc_norm) == (1 / 3, 1 / 3)
    assert found.num_tokens == 3 * sum(len(ids) - start for ids in whole)


def test_by_the_chat_template_the_choice_is_what_the_assistant_says(model: Any, tokenizer: Any) -> None:
    row = Choice("Who?", ("Anna", "Boris"), 0)
    turn = [{"role": "user", "content": "Who?"}]
    before = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=True)["input_ids"]
    plain = []
    for choice in row.choices:
        ids = tokenizer(choice, add_special_tokens=False)["input_ids"]
        plain.append(log_prob(model, before + ids, len(ids)))
    found = multiple_choice(model, tokenizer, [row], apply_chat_template=True)
    assert found.picked[0][0] == plain.index(max(plain))


@pytest.mark.parametrize("answer", [1, "1", "B", "b", "Boris"])
def test_the_answer_is_an_index_a_letter_or_a_text(answer: object) -> None:
    assert parse_choices([{"prompt": "Who?", "choices": ["Anna", "Boris"], "answer": answer}], "rows") == [
        Choice("Who?", ("Anna", "Boris"), 1)
    ]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"choices": ["a", "b"], "answer": 0}, "row 2: no question"),
        ({"question": "q", "choices": ["a"], "answer": 0}, "row 2: no choices"),
        ({"question": "q", "choices": "ab", "answer": 0}, "row 2: no choices"),
        ({"question": "q", "choices": ["a", "a"], "answer": 0}, "row 2: a choice stands twice"),
        ({"question": "q", "choices": ["a", "b"], "answer": 2}, r"row 2: the answer is none(.|\n)*0 to 1, A to B"),
        ({"question": "q", "choices": ["a", "b"], "answer": True}, "row 2: the answer is none"),
        ({"question": "q", "choices": ["a", "b"]}, "row 2: the answer is none"),
        ({"question": "q", "choices": ["a", "b"], "answer": "C"}, "row 2: the answer is none"),
    ],
)
def test_a_row_that_is_no_question_is_named(row: dict[str, Any], said: str) -> None:
    good = {"question": "q", "choices": ["a", "b"], "answer": 0}
    with pytest.raises(DataError, match=said):
        parse_choices([good, row], "rows.jsonl")


def test_no_rows_and_no_template_are_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl has no rows"):
        parse_choices([], "rows.jsonl")
    with pytest.raises(DataError, match="no rows to evaluate"):
        multiple_choice(model, tokenizer, [])
