"""A ring of buffers on the device through which the layers of a model pass, each fetched before its turn.

The ring is a cache: whoever wants a layer says so, and gets the buffer that holds it, after a copy if need be. In what
order layers are wanted is foreseen, and only decides which copies are begun early; a wrong guess costs the time of a
copy, never a wrong number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["NUM_SLOTS", "Copies", "DeviceCopies", "LayerRing", "PlainCopies", "Slot"]

# One in use, one on its way, and one whose work is under way still when the next one's begins.
NUM_SLOTS = 3


@dataclass(eq=False)
class Slot:
    """One buffer of the ring.

    Attributes:
        index: Its place in the ring.
        buffer: uint8 on the device, as long as the largest layer.
        layer: Which layer it holds, or will when the copy under way is done.
        ready: When the copy is done.
        streams: Streams that wait for that copy, and may read the buffer.
        left: When they have read what they were asked to when the layer was left.
    """

    index: int
    buffer: Tensor
    layer: int | None = None
    ready: torch.cuda.Event | None = None
    streams: list[torch.cuda.Stream] = field(default_factory=list)
    left: list[torch.cuda.Event] = field(default_factory=list)


class Copies(Protocol):
    """How a layer's bytes come into a slot. `begin`, `enter` and `leave` wait for nothing on the host."""

    def begin(self, slot: Slot, layer: int) -> None:
        """Begin to copy, once all that was asked of the slot's former layer is done."""

    def enter(self, slot: Slot) -> None:
        """What is launched from here on sees the layer."""

    def leave(self, slot: Slot) -> None:
        """All that reads the layer has been launched."""


class PlainCopies:
    """Copies within the host's memory, at once."""

    def __init__(self, layers: Sequence[Tensor]) -> None:
        self.layers = layers

    def begin(self, slot: Slot, layer: int) -> None:
        source = self.layers[layer]
        slot.buffer[: len(source)].copy_(source)

    def enter(self, slot: Slot) -> None:
        pass

    def leave(self, slot: Slot) -> None:
        pass


class DeviceCopies:
    """Copies from page-locked memory to a GPU, on a stream of their own.

    Args:
        layers: uint8, each layer's bytes.
        device: The GPU.
    """

    def __init__(self, layers: Sequence[Tensor], device: torch.device) -> None:
        self.layers = layers
        self.device = device
        self.stream = torch.cuda.Stream(device)

    def begin(self, slot: Slot, layer: int) -> None:
        self.copy(slot, self.layers[layer])

    def copy(self, slot: Slot, source: Tensor) -> None:
        for event in slot.left:
            self.stream.wait_event(event)
        slot.left, slot.streams = [], []
        with torch.cuda.stream(self.stream):
            slot.buffer[: len(source)].copy_(source, non_blocking=True)
            slot.ready = self.stream.record_event()
        # Let go in the middle of a copy, its memory is nobody else's before that is done.
        slot.buffer.record_stream(self.stream)

    def enter(self, slot: Slot) -> None:
        stream = torch.cuda.current_stream(self.device)
        if stream not in slot.streams:
            assert slot.ready is not None
            stream.wait_event(slot.ready)
            slot.streams.append(stream)
            slot.buffer.record_stream(stream)

    def leave(self, slot: Slot) -> None:
        slot.left = [stream.record_event() for stream in slot.streams]


class LayerRing:
    """Layers 0 to `num_layers` - 1 in the buffers of a ring.

    In training, forward passes go up and backward passes down: what the device holds at either turn is used again, and
    not copied. In evaluation the first layer follows the last. Which it is shows at the last layer, and is taken to be
    what it was before.

    Args:
        num_layers: How many there are.
        buffers: uint8 on the device, each as long as the largest layer; at least 1.
        copies: How they are filled.
    """

    def __init__(self, num_layers: int, buffers: Sequence[Tensor], copies: Copies) -> None:
        self.num_layers = num_layers
        self.copies = copies
        self.num_copies = 0
        self.slots = [Slot(index, buffer) for index, buffer in enumerate(buffers)]
        self._holding: dict[int, Slot] = {}
        self._current: int | None = None
        self._step = 1
        self._turns = True

    def enter(self, layer: int) -> Slot:
        """The slot that holds `layer`, for work that is launched before the next call of this."""
        if layer != self._current:
            self._move(layer)
        slot = self._holding[layer]
        try:
            self.copies.enter(slot)
        except BaseException:
            # What the slot holds is not known: whoever asks again has it copied again.
            self._current = None
            self._forget(slot)
            raise
        return slot

    def _move(self, layer: int) -> None:
        previous, self._current = self._current, None
        if previous is not None:
            self.copies.leave(self._holding[previous])
            self._learn(previous, layer)
        ahead = self._ahead(layer)
        for wanted in (layer, *ahead):
            if wanted not in self._holding:
                self._fetch(wanted, {layer, *ahead})
        self._current = layer

    def _learn(self, previous: int, layer: int) -> None:
        last = self.num_layers - 1
        if previous == last and self._step > 0 and layer in (0, last - 1):
            self._turns = layer != 0
        self._step = -1 if layer == previous - 1 else 1

    def _ahead(self, layer: int) -> list[int]:
        """The layers that come next, as many others as there are slots for."""
        others: list[int] = []
        position, step, last = layer, self._step, self.num_layers - 1
        while len(others) < min(len(self.slots), self.num_layers) - 1:
            if step > 0 and position == last:
                position, step = (last - 1, -1) if self._turns else (0, 1)
            elif step < 0 and position == 0:
                position, step = 1, 1
            else:
                position += step
            if position != layer and position not in others:
                others.append(position)
        return others

    def _fetch(self, layer: int, wanted: set[int]) -> None:
        slot = next(slot for slot in self.slots if slot.layer not in wanted)
        self._forget(slot)
        self.copies.begin(slot, layer)
        self.num_copies += 1
        slot.layer = layer
        self._holding[layer] = slot

    def _forget(self, slot: Slot) -> None:
        if slot.layer is not None:
            del self._holding[slot.layer]
            slot.layer = None
