"""The order that events keep between the three streams, on a CPU: streams that run as late and as mixed as they may."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fourfold.kernels import paging
from fourfold.kernels.paging import Page, Pager


class FakeDevice:
    """Streams as queues; `run` takes from any of them what no event holds back."""

    type = "cuda"

    def __init__(self, seed: int) -> None:
        self.choose = random.Random(seed).choice
        self.streams: list[FakeStream] = []
        self.current = FakeStream(self)

    def run(self, until: FakeStream | None = None) -> None:
        while any(stream.queue for stream in self.streams) and (until is None or until.queue):
            ready = [stream for stream in self.streams if stream.queue and stream.queue[0][0]()]
            assert ready, "the streams wait for each other"
            self.choose(ready).queue.pop(0)[1]()

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before


class FakeStream:
    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.queue: list[tuple[Callable[[], bool], Callable[[], Any]]] = []
        device.streams.append(self)

    def put(self, work: Callable[[], Any]) -> None:
        self.queue.append((lambda: True, work))

    def wait_event(self, event: FakeEvent) -> None:
        mark = event.mark
        self.queue.append((lambda: mark is None or bool(mark), lambda: None))

    def wait_stream(self, other: FakeStream) -> None:
        event = FakeEvent()
        event.record(other)
        self.wait_event(event)

    def synchronize(self) -> None:
        self.device.run(until=self)


class FakeEvent:
    """`mark` is that of the last record, as CUDA has it: empty until the stream has come so far."""

    mark: list[bool] | None = None

    def record(self, stream: FakeStream) -> None:
        mark = self.mark = []
        stream.put(lambda: mark.append(True))


class FakeTensor(torch.Tensor):
    def record_stream(self, stream: FakeStream) -> None: ...


@pytest.mark.parametrize("num_pages", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("seed", range(10))
def test_no_order_that_the_events_allow_changes_a_number(
    monkeypatch: pytest.MonkeyPatch, num_pages: int, seed: int
) -> None:
    device = FakeDevice(seed)
    fake = SimpleNamespace(
        empty=lambda *args, device, **options: torch.empty(*args, **options).as_subclass(FakeTensor),
        uint8=torch.uint8,
        cuda=SimpleNamespace(
            Event=FakeEvent, Stream=FakeStream, stream=device.stream, current_stream=lambda _: device.current
        ),
    )
    copy = paging._copy
    monkeypatch.setattr(paging, "torch", fake)
    monkeypatch.setattr(paging, "_copy", lambda targets, sources: device.current.put(lambda: copy(targets, sources)))
    numbers = torch.zeros(num_pages * 4)
    pages = [Page(index, 1, (numbers[4 * index : 4 * index + 4],)) for index in range(num_pages)]
    pager = Pager(pages, device)  # type: ignore[arg-type]

    def work(page: Page, values: torch.Tensor) -> None:
        # Not one that commutes: a page that is another's, or an older one, shows.
        values.mul_(2).add_(page.first_chunk + 1)

    for _ in range(4):
        for page, (values,) in pager.turn(pages):
            device.current.put(lambda page=page, values=values: work(page, values))
    pager.settle()
    assert numbers.view(num_pages, 4).tolist() == [[15.0 * (index + 1)] * 4 for index in range(num_pages)]
