"""Models whose base streams through a ring that holds garbage wherever it can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from decoders import decoder

from fourfold.models.loading import load_model
from fourfold.models.stream_ring import Slot
from fourfold.models.streaming import WeightStream
from fourfold.quantization.hf_config import FourfoldConfig

LAYERS = 5


class Late:
    """Makes each copy when its layer is entered, and not before; until then the buffer holds garbage."""

    def __init__(self, copies: Any) -> None:
        self.copies = copies
        self.waiting: set[int] = set()

    def begin(self, slot: Slot, layer: int) -> None:
        slot.buffer.random_(generator=torch.Generator().manual_seed(layer))
        self.waiting.add(slot.index)

    def enter(self, slot: Slot) -> None:
        if slot.index in self.waiting:
            self.waiting.remove(slot.index)
            assert slot.layer is not None
            self.copies.begin(slot, slot.layer)
        self.copies.enter(slot)

    def leave(self, slot: Slot) -> None:
        self.copies.leave(slot)


def poisoned(stream: WeightStream) -> WeightStream:
    stream.ring.copies = Late(stream.ring.copies)
    return stream


def write_checkpoint(folder: Path, name: str) -> Path:
    """A quantized checkpoint of a tiny decoder, in several shards, as large models have; what it was made of beside."""
    decoder(name, quantized=False, num_hidden_layers=LAYERS).save_pretrained(folder / "dense")
    quantized = load_model(folder / "dense", quantization=FourfoldConfig(), dtype=torch.float32, device="cpu")
    quantized.save_pretrained(folder, max_shard_size="60KB")
    return folder
