"""Decode passes as CUDA graphs: what a CPU can see of them."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from small_models import VOCAB, adapted_model, generated, small_model
from torch import Tensor

from fourfold.inference import Engine, EngineOptions, Request, SlotCache, decode_graphs, step_for
from fourfold.inference.decode_graphs import BUCKETS, GraphedStep, _Graph, fill, prompt_bucket
from fourfold.inference.generic_step import cache_shape
from fourfold.models.decoding import FusedStep


class Counting:
    """A step that tells which rows it was given."""

    vocab_size = 7

    def __init__(self) -> None:
        self.calls: list[int] = []

    def prefill(self, slot: int, input_ids: Tensor, cache: Any, adapter: str | None, start: int = 0) -> Tensor:
        return torch.full((self.vocab_size,), float(slot + start))

    def decode(self, tokens: Tensor, slots: Tensor, positions: Tensor, cache: Any, adapter: str | None) -> Tensor:
        self.calls.append(len(tokens))
        return (tokens + slots + positions)[:, None].expand(-1, self.vocab_size).float()


def test_on_a_cpu_it_is_the_step_itself() -> None:
    step = Counting()
    graphed = GraphedStep(step)
    cache = SimpleNamespace(version=0)
    rows = torch.arange(3)
    assert torch.equal(graphed.decode(rows, rows, rows, cache, None), step.decode(rows, rows, rows, cache, None))
    assert step.calls == [3, 3]
    assert graphed.vocab_size == 7
    assert graphed.prefill(2, rows, cache, None, start=4)[0] == 6
    with pytest.raises(AttributeError):
        graphed.missing  # noqa: B018


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_rows_that_are_left_over_repeat_the_first(rows: int) -> None:
    inputs = torch.full((3, 4), -1)
    given = torch.arange(3 * rows).view(3, rows)
    fill(inputs, *given)
    assert torch.equal(inputs[:, :rows], given)
    assert (inputs[:, rows:] == given[:, :1]).all()


def test_buckets_rise() -> None:
    assert list(BUCKETS) == sorted(set(BUCKETS))


class Replayed(GraphedStep):
    """Graphs where there is no GPU: a replay is the pass itself, over the inputs that a graph would read."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.captured: list[tuple[str, int]] = []

    @staticmethod
    def _serves(tokens: Tensor) -> bool:
        return True

    def _capture(self, pool: str, inputs: Tensor, run: Callable[[], Tensor], reserved_bytes: int = 0) -> _Graph:
        self.captured.append((pool, inputs.shape[-1]))
        logits = run()
        graph: Any = SimpleNamespace(replay=lambda: logits.copy_(run()))
        return _Graph(graph, inputs, logits)


def tokens(length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


def cache_for(model: Any, num_slots: int = 3, length: int = 256) -> SlotCache:
    return SlotCache(cache_shape(model), num_slots, length, "cpu", first_bucket=length)


def test_lengths_of_prompts_rise_by_64_or_an_eighth_and_are_few() -> None:
    for length in range(1, 5000):
        size = prompt_bucket(length)
        assert size == prompt_bucket(size)
        assert length <= size < max(length + 64, length * 1.125)
        assert size % 64 == 0  # cuDNN's attention takes these
    assert prompt_bucket(1000) == 1024
    assert len({prompt_bucket(length) for length in range(1, 2049)}) == 24


@pytest.mark.parametrize("adapter", [None, "default"])
def test_a_replayed_prompt_gives_the_logits_of_the_pass_and_leaves_the_same_in_its_slot(adapter: str | None) -> None:
    model = adapted_model()
    step = FusedStep(model)
    graphed, cache, plain = Replayed(step), cache_for(model), cache_for(model)
    # Both sides of edges, two lengths in turn, and a slot that was longer before.
    for number, length in enumerate([63, 100, 64, 128, 65, 1, 127, 2, 255, 250, 256, 60]):
        slot, prompt = (1, 2, 1)[number % 3], tokens(length, seed=number)
        before = [held.clone() for held in (*cache.keys, *cache.values) if held is not None]
        found = graphed.prefill(slot, prompt, cache, adapter)
        torch.testing.assert_close(found, step.prefill(slot, prompt, plain, adapter), rtol=1e-4, atol=1e-4)
        both = zip([*cache.keys, *cache.values], [*plain.keys, *plain.values], before, strict=True)
        for one, other, old in both:
            torch.testing.assert_close(one[slot, :, :length], other[slot, :, :length], rtol=1e-4, atol=1e-4)
            others = [index for index in range(3) if index != slot]
            assert torch.equal(one[others], old[others])
        behind = torch.tensor([length]), torch.tensor([slot])
        if length < 256:
            following = tokens(1, seed=99)
            ours = graphed.decode(following, behind[1], behind[0], cache, adapter)
            theirs = step.decode(following, behind[1], behind[0], plain, adapter)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert [size - 2 for pool, size in graphed.captured if pool == "prompts"] == [64, 128, 256]


def test_a_length_is_captured_when_it_comes_for_the_second_time() -> None:
    model = small_model()
    graphed, cache = Replayed(FusedStep(model)), cache_for(model)
    for length, graphs in [(30, 0), (100, 0), (40, 1), (30, 1), (120, 2), (200, 2)]:
        graphed.prefill(0, tokens(length), cache, None)
        assert len(graphed.captured) == graphs
    # Elsewhere than at the beginning of a prompt none is.
    for _ in range(3):
        graphed.prefill(0, tokens(30), cache, None, start=200)
    assert len(graphed.captured) == 2


def test_a_prompt_is_filled_up_no_further_than_its_slot_reaches() -> None:
    model = small_model()
    step = FusedStep(model)
    graphed, cache, plain = Replayed(step), cache_for(model, length=90), cache_for(model, length=90)
    for length in (80, 85, 90):
        found = graphed.prefill(2, tokens(length), cache, None)
        torch.testing.assert_close(found, step.prefill(2, tokens(length), plain, None), rtol=1e-4, atol=1e-4)
    assert graphed.captured == [("prompts", 92)]


def test_logits_of_a_prompt_outlive_the_next_pass() -> None:
    model = small_model()
    graphed, cache = Replayed(FusedStep(model)), cache_for(model)
    graphed.prefill(0, tokens(9), cache, None)
    first = graphed.prefill(0, tokens(9), cache, None)
    held = first.clone()
    assert not torch.equal(graphed.prefill(1, tokens(12, seed=3), cache, None), held)
    assert torch.equal(first, held)


def test_graphs_of_prompts_hold_for_one_state_of_cache_and_adapters_and_are_captured_anew_at_once() -> None:
    model = adapted_model()
    step = FusedStep(model)
    graphed, cache = Replayed(step), SlotCache(cache_shape(model), 2, 256, "cpu", first_bucket=128)
    for _ in range(2):
        graphed.prefill(0, tokens(50), cache, "default")
    cache.ensure(200)
    graphed.prefill(0, tokens(50), cache, "default")
    assert len(graphed.captured) == 2
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(2)
    step.refresh()
    found = graphed.prefill(0, tokens(50), cache, "default")
    assert len(graphed.captured) == 3
    expected = FusedStep(model).prefill(0, tokens(50), cache_for(model), "default")
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_of_too_many_graphs_the_one_goes_that_was_not_used_for_longest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_graphs, "MOST_PROMPT_GRAPHS", 2)
    model = small_model()
    graphed, cache = Replayed(FusedStep(model)), cache_for(model)
    for length in (60, 60, 120, 120, 60, 180, 180, 60, 120):
        graphed.prefill(0, tokens(length), cache, None)
    assert [size - 2 for _, size in graphed.captured] == [64, 128, 192]
    graphed.prefill(0, tokens(120), cache, None)
    assert [size - 2 for _, size in graphed.captured] == [64, 128, 192, 128]
    assert len(graphed._prompts) == 2


def test_prompts_that_cannot_be_captured_go_on_without(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = small_model()
    step = FusedStep(model)
    graphed, cache = Replayed(step), cache_for(model)

    def fails(*_: Any) -> _Graph:
        raise torch.OutOfMemoryError("none left")

    monkeypatch.setattr(graphed, "_capture", fails)
    for _ in range(3):
        found = graphed.prefill(0, tokens(50), cache, None)
    assert torch.equal(found, step.prefill(0, tokens(50), cache_for(model), None))
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "none left" in caplog.text


def test_an_engine_whose_prompts_are_replayed_answers_as_generate_does(tiny_tokenizer: Any) -> None:
    model = small_model("mistral")
    step = step_for(model, fused=True)
    fused = step.fused
    assert fused is not None
    step._graphs[fused] = replayed = Replayed(fused)
    # Prompts of one part, of several, and such as begin like the one before.
    options = EngineOptions(max_sequences=3, max_length=250, prefill_chunk=70, prefill_alone=200, first_bucket=64)
    engine = Engine(model, tiny_tokenizer, options, step=step)
    draw = random.Random(4)
    sequences = []
    for number in range(14):
        prompt = tuple(draw.randrange(3, VOCAB) for _ in range(draw.choice((3, 66, 72, 140, 215))))
        if number % 4 == 3:
            prompt = sequences[-1].request.prompt_ids + prompt[:20]
        sequences.append(engine.submit(Request(prompt[:235], max_new_tokens=9)))
        engine.step()
    while engine.has_work:
        engine.step()
    assert len({size for pool, size in replayed.captured if pool == "prompts"}) >= 2
    for sequence in sequences:
        assert sequence.error is None
        assert sequence.token_ids == generated(model, sequence.request.prompt_ids, 9)
