"""The ring through which layers pass: what it holds, what it copies, and when."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fourfold.models.stream_ring import DeviceCopies, LayerRing, PlainCopies, Slot

SIZE = 8


class LateCopies(PlainCopies):
    """A slot holds garbage from the moment its copy is begun until its layer is entered."""

    def begin(self, slot: Slot, layer: int) -> None:
        slot.buffer.fill_(255)

    def enter(self, slot: Slot) -> None:
        assert slot.layer is not None
        super().begin(slot, slot.layer)


def layers(count: int) -> list[Tensor]:
    return [torch.full((SIZE,), number, dtype=torch.uint8) for number in range(count)]


def ring(num_layers: int, num_slots: int = 3) -> LayerRing:
    buffers = [torch.full((SIZE,), 255, dtype=torch.uint8) for _ in range(min(num_slots, num_layers))]
    return LayerRing(num_layers, buffers, LateCopies(layers(num_layers)))


def passes(made: LayerRing, order: Sequence[int]) -> Iterator[int]:
    """Copies begun at each step."""
    for layer in order:
        before = made.num_copies
        assert made.enter(layer).buffer.tolist() == [layer] * SIZE
        yield made.num_copies - before


@pytest.mark.parametrize("num_layers", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_whatever_the_order_the_layer_asked_for_is_what_the_slot_holds(num_layers: int, num_slots: int) -> None:
    made = ring(num_layers, num_slots)
    generator = torch.Generator().manual_seed(num_layers)
    list(passes(made, torch.randint(num_layers, (300,), generator=generator).tolist()))


def test_each_layer_is_begun_before_its_turn_and_what_is_there_at_a_turn_is_not_copied_again() -> None:
    made = ring(6)
    step = [*range(6), *reversed(range(6))]
    first = list(passes(made, step))
    # The first layer and the two after it; then one at each step, until the last three are there.
    assert first[:6] == [3, 1, 1, 1, 0, 0]
    # Down: 5, 4 and 3 are there; as 5 is left its slot takes 2.
    assert first[6:] == [0, 1, 1, 1, 0, 0]
    # From then on, six copies a step: of the three layers that are not there at either turn.
    for _ in range(3):
        assert list(passes(made, step)) == [0, 1, 1, 1, 0, 0] * 2


def test_in_evaluation_the_first_layer_is_begun_before_the_last_one_is_left() -> None:
    made = ring(6)
    list(passes(made, [*range(6)] * 2))
    assert list(passes(made, [*range(6)])) == [1] * 6


def test_a_change_between_training_and_evaluation_costs_copies_at_its_first_turn_alone() -> None:
    made = ring(6)
    step, evaluation = [*range(6), *reversed(range(6))], [*range(6)]
    list(passes(made, [*step, *step, *evaluation, *evaluation]))
    list(passes(made, step))
    assert list(passes(made, step)) == [0, 1, 1, 1, 0, 0] * 2


def test_a_copy_that_fails_is_made_again_when_it_is_asked_for_again() -> None:
    class Failing(LateCopies):
        fails = True

        def enter(self, slot: Slot) -> None:
            if slot.layer == 2 and self.fails:
                raise OSError("the disk is gone")
            super().enter(slot)

    copies = Failing(layers(6))
    made = LayerRing(6, [torch.empty(SIZE, dtype=torch.uint8) for _ in range(3)], copies)
    list(passes(made, [0, 1]))
    for _ in range(2):
        with pytest.raises(OSError, match="the disk is gone"):
            made.enter(2)
    list(passes(made, [1, 0]))
    copies.fails = False
    list(passes(made, [2, 3, 0, 5]))


class Clock:
    """A stream as what is known on it to be done: (stream, how far). A copy or a read is one more step of its own."""

    current: Clock

    def __init__(self, *_: Any) -> None:
        self.known: dict[int, int] = {}

    def wait_event(self, event: dict[int, int]) -> None:
        for stream, step in event.items():
            self.known[stream] = max(self.known.get(stream, 0), step)

    def record_event(self) -> dict[int, int]:
        return dict(self.known)

    def step(self) -> dict[int, int]:
        self.known[id(self)] = self.known.get(id(self), 0) + 1
        return {id(self): self.known[id(self)]}

    def knows(self, done: dict[int, int]) -> bool:
        return all(self.known.get(stream, 0) >= step for stream, step in done.items())


@pytest.fixture
def clocks(monkeypatch: pytest.MonkeyPatch) -> list[Clock]:
    """Two streams that compute, in the place of CUDA's."""
    computing = [Clock(), Clock()]

    @contextlib.contextmanager
    def within(stream: Clock) -> Iterator[None]:
        before, Clock.current = Clock.current, stream
        yield
        Clock.current = before

    monkeypatch.setattr(Clock, "current", computing[0], raising=False)
    monkeypatch.setattr(torch.cuda, "Stream", Clock)
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _=None: Clock.current)
    monkeypatch.setattr(Tensor, "record_stream", lambda *_: None)
    return computing


@pytest.mark.parametrize("num_streams", [1, 2])
def test_no_copy_runs_beside_a_read_of_its_slot_nor_a_read_beside_the_copy(
    clocks: list[Clock], num_streams: int
) -> None:
    copied: dict[int, dict[int, int]] = {}
    reads: dict[int, list[dict[int, int]]] = {}

    class Watched(DeviceCopies):
        def copy(self, slot: Slot, source: Tensor) -> None:
            super().copy(slot, source)
            # What `super` waited for is known on the stream of the copies.
            copying: Any = self.stream
            assert all(copying.knows(read) for read in reads.get(slot.index, []))
            copied[slot.index], reads[slot.index] = copying.step(), []
            slot.ready = copying.record_event()

    made = LayerRing(
        6,
        [torch.empty(SIZE, dtype=torch.uint8) for _ in range(3)],
        Watched(layers(6), torch.device("cpu")),
    )
    generator = torch.Generator().manual_seed(0)
    order = [*range(6), *reversed(range(6)), *torch.randint(6, (300,), generator=generator).tolist()]
    for layer in order * 2:
        for stream in torch.randint(num_streams, (3,), generator=generator).tolist():
            Clock.current = clocks[stream]
            slot = made.enter(layer)
            assert slot.buffer.tolist() == [layer] * SIZE
            assert Clock.current.knows(copied[slot.index])
            reads.setdefault(slot.index, []).append(Clock.current.step())
