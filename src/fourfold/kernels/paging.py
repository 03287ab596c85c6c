"""Pages of memory that live in the host's pinned memory and are on the device only while they are worked on.

While page i is worked on by the current stream, page i + 1 comes in on a stream of its own and page i - 1 goes back on
another. There are NUM_SLOTS buffers on the device, which pages take in turn; events keep each from being written to
before what it holds has gone. The host waits for nothing: all it does is to put copies into streams.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fourfold.errors import TrainingError
from fourfold.kernels.host_memory import HostBuffer, available_bytes

__all__ = ["NUM_SLOTS", "PAGE_BYTES", "Page", "Pager", "host_buffer", "slot_bytes"]

PAGE_BYTES = 64 * 2**20
"""A page of this size takes 1 ms or so over PCIe: long beside a launch, and short beside a whole state."""

NUM_SLOTS = 3
"""One page comes in, one is worked on, one goes back."""

# Where a part of a page begins in its slot: what kernels load vectors from, and copies are fast to.
_ALIGNMENT = 256


class Page(NamedTuple):
    """Work on one page: `num_chunks` chunks from `first_chunk` on, with these parts of flat memory on the host."""

    first_chunk: int
    num_chunks: int
    home: tuple[Tensor, ...]


class _Slot:
    """A buffer on the device, and the events of the page in it; on a CPU there are none."""

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self.memory = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        if device.type == "cuda":
            self.arrived, self.worked_on, self.gone = (torch.cuda.Event() for _ in range(3))

    def parts(self, page: Page) -> tuple[Tensor, ...]:
        """Views of the shapes and dtypes of the page's parts."""
        views, start = list[Tensor](), 0
        for part in page.home:
            views.append(self.memory[start : start + part.nbytes].view(part.dtype))
            start += _aligned(part.nbytes)
        return tuple(views)


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT


def slot_bytes(parts: Iterable[int]) -> int:
    """Bytes on the device of a page whose parts have these bytes."""
    return sum(map(_aligned, parts))


class Pager:
    """Moves the pages of one optimizer. On a CPU the same turns are made by plain copies.

    Args:
        pages: All that will ever be moved. Each has its slot for good, so that what a step brings in has gone back, in
            the step before, before its slot was free.
        device: Where they are worked on.

    Attributes:
        slots: Buffers on the device.
    """

    def __init__(self, pages: Sequence[Page], device: torch.device) -> None:
        self.device = device
        largest = max(slot_bytes(part.nbytes for part in page.home) for page in pages)
        self.slots = [_Slot(largest, device) for _ in range(min(NUM_SLOTS, len(pages)))]
        # Slot and views of it, made once: they would cost the host more than a copy does.
        self._place = dict[int, tuple[_Slot, tuple[Tensor, ...]]]()
        for number, page in enumerate(pages):
            slot = self.slots[number % len(self.slots)]
            self._place[page.first_chunk] = (slot, slot.parts(page))
        if device.type == "cuda":
            self._coming, self._going = torch.cuda.Stream(device), torch.cuda.Stream(device)
            # What a slot was given may be memory that work in the current stream still uses.
            self._coming.wait_stream(torch.cuda.current_stream(device))
            for slot in self.slots:
                slot.memory.record_stream(self._coming)
                slot.memory.record_stream(self._going)

    def turn(self, pages: Sequence[Page]) -> Iterator[tuple[Page, tuple[Tensor, ...]]]:
        """Each page with its parts on the device, to be changed there by work put into the current stream."""
        for page in pages:
            slot, parts = self._place[page.first_chunk]
            self._bring(page, slot, parts)
            yield page, parts
            self._send_back(page, slot, parts)

    def _bring(self, page: Page, slot: _Slot, parts: tuple[Tensor, ...]) -> None:
        if self.device.type != "cuda":
            _copy(parts, page.home)
            return
        with torch.cuda.stream(self._coming):
            self._coming.wait_event(slot.gone)
            _copy(parts, page.home)
            slot.arrived.record(self._coming)
        torch.cuda.current_stream(self.device).wait_event(slot.arrived)

    def _send_back(self, page: Page, slot: _Slot, parts: tuple[Tensor, ...]) -> None:
        if self.device.type != "cuda":
            _copy(page.home, parts)
            return
        slot.worked_on.record(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._going):
            self._going.wait_event(slot.worked_on)
            _copy(page.home, parts)
            slot.gone.record(self._going)

    def settle(self) -> None:
        """Wait until every page is back in the host's memory."""
        if self.device.type == "cuda":
            self._going.synchronize()


def _copy(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source, non_blocking=True)


def host_buffer(num_bytes: int, device: torch.device) -> HostBuffer:
    """Zeros in the host's memory for state that is paged to `device`: pinned, unless that is a CPU.

    Raises:
        TrainingError: There is not so much memory, or it cannot be pinned.
    """
    hint = (
        "page less by an 8-bit optimizer (optim: paged_adamw_8bit), or keep state on the GPU (optim: adamw_8bit); "
        "`ulimit -l` is the limit on pinned memory"
    )
    available = available_bytes()
    if available is not None and num_bytes > available:
        # Linux gives out more than there is, and ends the process that uses it.
        raise TrainingError(
            f"The host has no {num_bytes:,} bytes of memory left for the optimizer's paged state",
            found=f"{available:,} bytes",
            hint=hint,
        )
    try:
        buffer = HostBuffer(num_bytes, pinned=device.type == "cuda", purpose="the optimizer's paged state")
    except TrainingError as error:
        raise TrainingError(error.what, found=f"{error.found}, for {num_bytes:,} bytes", hint=hint) from error
    if device.type != "cuda":
        buffer.data.zero_()  # what is pinned comes from the system, as zeros
    return buffer
