"""Quantized layers on the disk: mapped into memory, and read ahead of the copies to the device."""

from __future__ import annotations

import json
import logging
import mmap
import os
import time
import weakref
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fourfold.errors import CheckpointError
from fourfold.kernels.host_memory import HostBuffer
from fourfold.models.checkpoint_files import check_checkpoint
from fourfold.models.stream_ring import DeviceCopies, Slot

__all__ = ["NUM_HOST_BUFFERS", "DiskCopies", "MappedFiles", "Piece"]

logger = logging.getLogger(__name__)

# One is filled, one copied to the device, and one is neither done with nor begun.
NUM_HOST_BUFFERS = 3
_NUM_READERS = 4
_READ_BYTES = 16 * 2**20
# The bandwidth is said after a pass over the layers, or, where that takes longer, after so much reading.
_TELL_SECONDS = 10.0
# A disk that is read from for this share of the time, over at least so many seconds, is what the run waits for.
_BUSY_SHARE, _BUSY_SECONDS = 0.9, 1.0
# Whoever waits longer than this for a layer hears of it, and again after as long.
_PATIENCE_SECONDS = 30.0
# safetensors' names, of what quantized tensors are made of.
_DTYPES = {"U8": torch.uint8, "I8": torch.int8, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class MappedFiles:
    """The tensors of a checkpoint's safetensors by name, in the memory of the mapped files: nothing is read yet.

    Args:
        folder: `model.safetensors`, or shards with `model.safetensors.index.json`.

    Raises:
        CheckpointError: Files that are missing, cut short or no safetensors.
    """

    def __init__(self, folder: Path) -> None:
        check_checkpoint(folder)
        index = folder / "model.safetensors.index.json"
        names = ["model.safetensors"]
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        self.folder = folder
        self.tensors: dict[str, Tensor] = {}
        # (address of the map, its length, an open file)
        self._maps: list[tuple[int, int, int]] = []
        for name in names:
            self._map(folder / name)

    def _map(self, path: Path) -> None:
        with path.open("rb") as file:
            # Copy on write: a tensor is writable, the file is not written to.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            descriptor = os.dup(file.fileno())
        weakref.finalize(self, os.close, descriptor)
        length = int.from_bytes(mapped[:8], "little")
        header = json.loads(mapped[8 : 8 + length])
        for name, entry in header.items():
            dtype = _DTYPES.get(entry.get("dtype"))
            if name == "__metadata__" or dtype is None:
                continue
            begin, end = entry["data_offsets"]
            count = (end - begin) // dtype.itemsize
            flat = torch.empty(0, dtype=dtype)
            if count:
                flat = torch.frombuffer(mapped, dtype=dtype, count=count, offset=8 + length + begin)
            self.tensors[name] = flat.view(entry["shape"])
        self._maps.append((torch.frombuffer(mapped, dtype=torch.uint8).data_ptr(), len(mapped), descriptor))

    def piece(self, tensor: Tensor, offset: int) -> Piece:
        """Where to read a tensor that lies in one of the maps, or the tensor itself."""
        address = tensor.data_ptr()
        for begin, length, descriptor in self._maps:
            if begin <= address and address + tensor.nbytes <= begin + length:
                return Piece(offset, tensor.nbytes, (descriptor, address - begin), None)
        return Piece(offset, tensor.nbytes, None, tensor)


@dataclass(frozen=True)
class Piece:
    """A tensor's place among its layer's bytes, and where it comes from.

    Args:
        offset: Of its first byte.
        num_bytes: Its bytes.
        place: An open file and the offset in it, or None.
        tensor: The tensor, where it is in no file.
    """

    offset: int
    num_bytes: int
    place: tuple[int, int] | None
    tensor: Tensor | None

    def reads(self) -> list[tuple[int, int, int, int]]:
        """(file, offset in it, offset among the layer's bytes, bytes) of at most `_READ_BYTES` each."""
        if self.place is None:
            return []
        file, start = self.place
        steps = range(0, self.num_bytes, _READ_BYTES)
        return [(file, start + at, self.offset + at, min(_READ_BYTES, self.num_bytes - at)) for at in steps]


class DiskCopies:
    """Reads layers into a few host buffers, in a thread of its own, and has each copied to the device from there.

    Files are read and not copied from their map: a file that is cut short meanwhile is an error, and no dead process.
    The log has the bandwidth, once whether the run waits for the disk, and each layer that is long in coming.

    Args:
        layers: The pieces of each layer.
        num_bytes: Of each layer.
        copies: To the device; None where the ring itself is in host memory.
        files: What the pieces lie in.
    """

    def __init__(
        self,
        layers: Sequence[Sequence[Piece]],
        num_bytes: Sequence[int],
        copies: DeviceCopies | None,
        files: MappedFiles,
    ) -> None:
        self.layers, self.num_bytes, self.copies = layers, num_bytes, copies
        # Held, so that they stay open.
        self.files = files
        self._buffers: list[HostBuffer] = []
        # In the order of their use, and when the copies from them are done.
        self._used: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        if copies is not None:
            for _ in range(min(NUM_HOST_BUFFERS, len(layers))):
                self._buffers.append(HostBuffer(max(num_bytes), pinned=True, purpose="layers on their way from disk"))
            self._used.extend((buffer.data, None) for buffer in self._buffers)
        self._pending: dict[int, Future[None]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="layers")
        self._readers = ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="layer-parts")
        for pool in (self._thread, self._readers):
            weakref.finalize(self, pool.shutdown, wait=False)
        self._read_bytes, self._read_seconds = 0, 0.0
        # Since when these count, and what has been said.
        self._began, self._is_told, self._is_slow = time.perf_counter(), False, False

    def begin(self, slot: Slot, layer: int) -> None:
        self._pending[slot.index] = self._thread.submit(self._bring, slot, layer)

    def enter(self, slot: Slot) -> None:
        pending = self._pending.get(slot.index)
        if pending is not None:
            self._wait(pending, slot)
            del self._pending[slot.index]
        if self.copies is not None:
            self.copies.enter(slot)

    def _wait(self, pending: Future[None], slot: Slot) -> None:
        waited = 0.0
        while not wait([pending], timeout=_PATIENCE_SECONDS).done:
            waited += _PATIENCE_SECONDS
            logger.warning(
                "Still waiting for layer %s from %s, for %.0f s: the disk is slow, or does not answer",
                *(slot.layer, self.files.folder, waited),
            )
        pending.result()

    def leave(self, slot: Slot) -> None:
        if self.copies is not None:
            self.copies.leave(slot)

    def _bring(self, slot: Slot, layer: int) -> None:
        if self.copies is None:
            self._read(slot.buffer, layer)
            return
        buffer, copied = self._used[0]
        if copied is not None:
            copied.synchronize()
        self._read(buffer, layer)
        self.copies.copy(slot, buffer[: self.num_bytes[layer]])
        self._used[0] = buffer, slot.ready
        self._used.rotate(-1)

    def _read(self, buffer: Tensor, layer: int) -> None:
        started = time.perf_counter()
        target = memoryview(buffer.numpy())  # type: ignore[arg-type]  # NumPy's stubs lack the buffer protocol
        reads = []
        for piece in self.layers[layer]:
            reads += piece.reads()
            if piece.tensor is not None and piece.num_bytes:
                own = piece.tensor.reshape(-1).view(torch.uint8)
                buffer[piece.offset : piece.offset + piece.num_bytes].copy_(own)
        for _ in self._readers.map(lambda each: self._read_part(target, *each), reads):
            pass
        self._read_seconds += time.perf_counter() - started
        self._read_bytes += self.num_bytes[layer]
        if self._read_bytes >= sum(self.num_bytes) or self._read_seconds >= _TELL_SECONDS:
            self._tell()

    def _tell(self) -> None:
        """Say what was read, and begin to count anew."""
        rate, whole = self._read_bytes / self._read_seconds, sum(self.num_bytes)
        now = time.perf_counter()
        elapsed = now - self._began
        if not self._is_told:
            self._is_told = True
            logger.info(
                "The base streams from %s at %.2f GB/s: %.1f s for its %.2f GB, in each pass over the layers",
                *(self.files.folder, rate / 1e9, whole / rate, whole / 1e9),
            )
        elif not self._is_slow and elapsed >= _BUSY_SECONDS and self._read_seconds >= _BUSY_SHARE * elapsed:
            self._is_slow = True
            logger.warning(
                "The run waits for the disk: %s is read for %.0f%% of the time, at %.0f MB/s, %.1f s for each pass "
                "over the layers; a faster disk, or host memory (stream_base: host), would make it faster",
                *(self.files.folder, 100 * self._read_seconds / elapsed, rate / 1e6, whole / rate),
            )
        self._read_bytes, self._read_seconds, self._began = 0, 0.0, now

    def _read_part(self, target: memoryview, file: int, offset: int, start: int, num_bytes: int) -> None:
        done = 0
        while done < num_bytes:
            try:
                count = os.preadv(file, [target[start + done : start + num_bytes]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"a file in {self.files.folder} could not be read while the base streamed from it",
                    found=str(error),
                    hint="see to the disk, and resume from the last checkpoint",
                ) from error
            if count == 0:
                raise CheckpointError(
                    f"a file in {self.files.folder} was cut short while the base streamed from it",
                    hint="bring the checkpoint back, and leave it alone while a run reads it",
                )
            done += count
