from __future__ import annotations

from typing import Any

import pytest
from small_models import adapted_model, small_model

from fourfold.errors import InferenceError
from fourfold.inference import Engine, EngineOptions
from fourfold.inference.choosing import step_for
from fourfold.inference.decode_graphs import GraphedStep
from fourfold.inference.footprint import fitting_options, serving_footprint, temporary_bytes
from fourfold.inference.generic_step import cache_shape
from fourfold.models.decoding import FusedStep

MODEL = small_model()
SHAPE = cache_shape(MODEL)


def needed(options: EngineOptions, sequences: int, length: int) -> int:
    return SHAPE.num_bytes(sequences, length) + temporary_bytes(MODEL, SHAPE, options, sequences, length)


def fitted(free: int | None, context: int | None = 4096, **asked: Any) -> tuple[int, int]:
    return fitting_options(MODEL, SHAPE, EngineOptions(**asked), context, free)


def test_what_is_asked_for_is_given_where_it_fits_up_to_the_context() -> None:
    assert fitted(None) == (8, 2048)
    assert fitted(None, context=256) == (8, 256)
    assert fitted(None, max_length=None) == (8, 4096)
    assert fitted(2**40, max_sequences=None, max_length=None) == (64, 4096)


def test_what_is_left_open_is_the_most_that_fits() -> None:
    options = EngineOptions(max_sequences=4, max_length=None)
    free = needed(options, 4, 1000)
    sequences, length = fitted(free, max_sequences=4, max_length=None)
    assert sequences == 4
    assert needed(options, 4, length) <= free < needed(options, 4, length + 1)
    options = EngineOptions(max_sequences=None, max_length=500)
    free = needed(options, 5, 500)
    assert fitted(free, max_sequences=None, max_length=500) == (5, 500)
    assert fitted(free - 1, max_sequences=None, max_length=500) == (4, 500)


def test_what_does_not_fit_is_refused_naming_what_does() -> None:
    free = needed(EngineOptions(), 3, 2048)
    with pytest.raises(
        InferenceError, match=r"8 sequences of 2,048 tokens take .*\n.*3 sequences of 2,048 tokens or 8"
    ):
        fitted(free)
    with pytest.raises(InferenceError, match="the model itself leaves too little"):
        fitted(1000)


def test_what_graphs_of_prompts_keep_is_part_of_what_must_fit() -> None:
    options = EngineOptions(max_sequences=4, max_length=None)
    free = needed(options, 4, 1000) + 7 * 1000
    sequences, length = fitting_options(MODEL, SHAPE, options, 4096, free, lambda length: 7 * length)
    assert (sequences, length) == (4, 1000)
    captured = serving_footprint(MODEL, SHAPE, options, 4, 1000, lambda length: 7 * length)
    assert captured.temporary == serving_footprint(MODEL, SHAPE, options, 4, 1000).temporary + 7000


def test_they_keep_a_pass_over_their_longest_prompt() -> None:
    step = FusedStep(adapted_model())
    graphed = GraphedStep(step)
    assert graphed.captured_bytes(100) > step.prompt_bytes(100) > FusedStep(small_model()).prompt_bytes(100)
    assert graphed.captured_bytes(4096) == graphed.captured_bytes(2048) > graphed.captured_bytes(1024)
    # Weights of one layer and activations of 100 tokens, of 4 bytes each.
    mlp, hidden, inner = 3 * 32 * 64, 32, 64
    assert FusedStep(small_model()).prompt_bytes(100) == 4 * (mlp + 100 * (4 * hidden + 3 * inner))
    assert step_for(small_model(), fused=True).captured_bytes(1024) == 0  # on a CPU


def test_the_parts_are_those_of_the_engine(tiny_tokenizer: Any) -> None:
    model = adapted_model()
    engine = Engine(model, tiny_tokenizer, EngineOptions(max_sequences=2, max_length=64))
    footprint = engine.footprint
    lora = sum(value.nbytes for name, value in model.named_parameters() if "lora_" in name)
    assert footprint.adapters == lora
    assert footprint.base + lora == sum(value.nbytes for value in model.parameters())
    assert footprint.cache == engine.cache.num_bytes
    assert footprint.total == sum(footprint.to_dict()[part] for part in ("base", "adapters", "cache", "temporary"))
    assert "2 sequences of up to 64 tokens" in "\n".join(footprint.lines())


def test_an_engine_takes_no_more_than_it_may(tiny_tokenizer: Any) -> None:
    free = needed(EngineOptions(), 2, 200)
    options = EngineOptions(max_sequences=2, max_length=None, memory_bytes=free)
    engine = Engine(small_model(), tiny_tokenizer, options)
    assert (engine.max_sequences, engine.max_length) == (2, 200)
    with pytest.raises(InferenceError, match="does not fit"):
        Engine(small_model(), tiny_tokenizer, EngineOptions(memory_bytes=1000))
