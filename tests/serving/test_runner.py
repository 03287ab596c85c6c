"""How answers come from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from running import Scripted

from fourfold.inference.engine import Engine
from fourfold.inference.requests import Request
from fourfold.serving import Served
from fourfold.serving import runner as module
from fourfold.serving.runner import Runner


def sizes_of_calls(engine: Engine, seconds_a_step: float, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Chunks in each call to the event loop, of two answers of 40 tokens, by a clock that steps move."""
    scripted, deliver = Scripted(engine), module._deliver_all
    sizes: list[int] = []

    def counted(given: list[Any]) -> None:
        sizes.append(len(given))
        deliver(given)

    monkeypatch.setattr(module, "_deliver_all", counted)
    runner = Runner(scripted, 2, 2, clock=lambda: scripted.num_steps * seconds_a_step)

    async def text_of(answers: module.Answers) -> str:
        text = ""
        while True:
            for _, chunk in await answers.read():
                text += chunk.text
                if chunk.finish_reason is not None:
                    return text

    async def run() -> list[str]:
        answers = [runner.submit([Request((1, 2), max_new_tokens=40)]) for _ in range(2)]
        runner.start()
        return await asyncio.gather(*map(text_of, answers))

    try:
        assert asyncio.run(run()) == ["".join(scripted.words) * 4] * 2
    finally:
        runner.stop()
    return sizes


def test_what_short_steps_give_goes_out_together_but_for_the_first_and_the_last(
    tiny_served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Two answers have an event every two milliseconds, which five steps take.
    sizes = sizes_of_calls(tiny_served.engine, 2**-11, monkeypatch)
    assert sizes[0] == 2
    assert set(sizes[1:-1]) == {10}
    assert sum(sizes) == 80


def test_long_steps_give_what_they_have_at_once(tiny_served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sizes_of_calls(tiny_served.engine, 0.05, monkeypatch) == [2] * 40
