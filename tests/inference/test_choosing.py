from __future__ import annotations

import logging
import random
from typing import Any

import pytest
from small_models import VOCAB, adapted_model, generated, small_model

from fourfold.inference import Engine, EngineOptions, Request
from fourfold.inference.choosing import step_for

OPTIONS = EngineOptions(max_sequences=3, max_length=128, prefill_chunk=5, prefill_alone=7, first_bucket=16)


def answered(model: Any, tokenizer: Any, step: Any, *adapters: str | None) -> list[list[int]]:
    """Answers by each of these adapters, at once."""
    engine = Engine(model, tokenizer, OPTIONS, step=step)
    draw = random.Random(1)
    sequences = []
    for number in range(6):
        tokens = tuple(draw.randrange(3, VOCAB) for _ in range(draw.choice((3, 9, 22))))
        adapter = adapters[number % len(adapters)]
        sequences.append(engine.submit(Request(tokens, max_new_tokens=draw.choice((4, 9)), adapter=adapter)))
        engine.step()
    while engine.has_work:
        engine.step()
    assert [sequence.error for sequence in sequences] == [None] * 6
    return [sequence.token_ids for sequence in sequences]


@pytest.mark.parametrize("family", ["llama", "qwen2", "mistral"])
def test_the_fused_step_answers_as_generate_does(family: str, tiny_tokenizer: Any) -> None:
    model = small_model(family)
    step = step_for(model, fused=True)
    assert step.fused is not None
    engine = Engine(model, tiny_tokenizer, OPTIONS, step=step)
    draw = random.Random(2)
    sequences = []
    for _ in range(5):
        tokens = tuple(draw.randrange(3, VOCAB) for _ in range(draw.choice((3, 9, 22))))
        sequences.append(engine.submit(Request(tokens, max_new_tokens=9)))
        engine.step()
    while engine.has_work:
        engine.step()
    for sequence in sequences:
        assert sequence.token_ids == generated(model, sequence.request.prompt_ids, 9)


def test_adapters_are_fused_by_name(tiny_tokenizer: Any) -> None:
    names = (None, "default", "other")
    fused = answered(adapted_model(), tiny_tokenizer, step_for(adapted_model(), fused=True), *names)
    generic = answered(adapted_model(), tiny_tokenizer, step_for(adapted_model(), fused=False), *names)
    assert fused == generic


def test_models_without_a_fused_step_say_so_and_take_the_generic_one(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert step_for(small_model("gpt2"), fused=True).fused is None
    assert "generic path, which is slower" in caplog.text
    assert step_for(small_model("llama")).fused is None  # on a CPU
