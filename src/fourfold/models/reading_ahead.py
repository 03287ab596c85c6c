"""A checkpoint's tensors, read ahead of whoever asks for them and sent to the device they are for.

Threads read the files piece by piece, in the order in which the tensors will be asked for, into a ring of buffers; from
there the pieces are copied into the tensors on a stream of the copies' own. So the disk, the host link and the GPU,
which quantizes the tensors that came before, all work at once, and of the host's memory no more than the ring is used:
the files are read rather than mapped, and what lies in the system's page cache is copied by several cores at once.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import threading
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fourfold.errors import CheckpointError
from fourfold.kernels.availability import say_once
from fourfold.models.checkpoint_files import StoredTensor

__all__ = ["LazyTensor", "ReadAhead", "can_read_ahead", "natural_key"]

logger = logging.getLogger(__name__)

# Small enough for the first tensor to come soon, large enough for a thread to read more than it waits for the others.
CHUNK_BYTES = 16 * 2**20
NUM_BUFFERS = 16
NUM_THREADS = 8
# Of the device's memory, for tensors that are sent while their time has not come.
SENT_AHEAD_BYTES = 256 * 2**20
# Of tensors that have come before they were asked for, those beyond this are let go, and read again if need be.
HELD_BYTES = 2 * 2**30


def can_read_ahead() -> bool:
    """Whether this system reads files at given places from several threads at once."""
    return hasattr(os, "preadv")


class _Piece(NamedTuple):
    """Bytes of one tensor that lie in one chunk."""

    name: str
    start: int
    num_bytes: int


class _Buffer:
    """Host memory for a chunk, and the event after which it may be written to again."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory
        self.sent: torch.cuda.Event | None = None


class _Arrival(NamedTuple):
    """A tensor on its device, and the event after which all of it is there."""

    tensor: Tensor
    event: torch.cuda.Event | None


class LazyTensor:
    """A tensor that is read when it is indexed: safetensors' own interface of such (`safe_open(...).get_slice`)."""

    def __init__(self, reader: ReadAhead, name: str, stored: StoredTensor) -> None:
        self._reader = reader
        self._name = name
        self._stored = stored

    def get_shape(self) -> list[int]:
        return list(self._stored.shape)

    def get_dtype(self) -> str:
        return self._stored.dtype_name

    def __getitem__(self, index: Any) -> Tensor:
        tensor = self._reader.take(self._name)
        return tensor if index is Ellipsis else tensor[index]


class ReadAhead:
    """Reads stored tensors for `device`; a context manager, within which they may be taken.

    Any tensor may be taken at any time, from any thread and more than once, but it is fast in the natural order of the
    names only, in which Transformers takes them.

    Args:
        stored: Where the tensors lie, by name.
        device: Where they are wanted.
        chunk_bytes: What is read at a time.
        num_buffers: Chunks that may be read before they are wanted.
        num_threads: Threads that read.
        held_bytes: What may wait on the device without having been asked for, so that another one could be.

    Attributes:
        tensors: By name, what reads a tensor when it is indexed.
        error: What stopped the reading; whoever takes a tensor is told, too.
    """

    def __init__(
        self,
        stored: Mapping[str, StoredTensor],
        device: torch.device,
        *,
        chunk_bytes: int = CHUNK_BYTES,
        num_buffers: int = NUM_BUFFERS,
        num_threads: int = NUM_THREADS,
        held_bytes: int = HELD_BYTES,
    ) -> None:
        self.tensors = {name: LazyTensor(self, name, tensor) for name, tensor in stored.items()}
        self.error: BaseException | None = None
        self._stored = stored
        self._device = device
        self._held_bytes = held_bytes
        self._chunks = _chunks(stored, chunk_bytes)
        self._buffer_sizes = [chunk_bytes] * min(num_buffers, len(self._chunks))
        self._threads = [threading.Thread(target=self._read, daemon=True) for _ in range(num_threads)]
        self._files: dict[Path, int] = {}
        self._free: queue.SimpleQueue[_Buffer | None] = queue.SimpleQueue()
        # What the threads share: the chunks that have been read, and the number of the next one to read.
        self._changed = threading.Condition()
        self._read_chunks: dict[int, _Buffer] = {}
        self._next_to_read = 0
        self._is_closed = False
        # What those share who take tensors.
        self._lock = threading.Lock()
        self._next_to_send = 0
        self._begun: dict[str, Tensor] = {}
        self._arrived: dict[str, _Arrival] = {}
        self._gone: set[str] = set()
        is_cuda = device.type == "cuda"
        self._stream = torch.cuda.current_stream(device) if is_cuda else None
        self._copies = torch.cuda.Stream(device) if is_cuda else None

    def __enter__(self) -> ReadAhead:
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self._close)
            for path in {tensor.path for tensor in self._stored.values()}:
                self._files[path] = os.open(path, os.O_RDONLY)
            for thread in self._threads:
                thread.start()
            # Pinning takes long enough for the first buffers to be filled meanwhile.
            for size in self._buffer_sizes:
                self._free.put(_Buffer(_host_memory(size, is_pinned=self._copies is not None)))
            on_failure.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def _close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        started = [thread for thread in self._threads if thread.ident is not None]
        for _ in started:
            self._free.put(None)
        for thread in started:
            thread.join()
        with self._lock:
            if self._stream is not None and self._copies is not None:
                # What was not taken is freed on this stream, and must not be written to after that.
                self._stream.wait_stream(self._copies)
            self._begun.clear()
            self._arrived.clear()
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()

    # The threads that read.

    def _read(self) -> None:
        while (buffer := self._free.get()) is not None:
            if buffer.sent is not None:
                buffer.sent.synchronize()
            # A number is taken by who has a buffer already: the chunk that is waited for always comes.
            with self._changed:
                number, self._next_to_read = self._next_to_read, self._next_to_read + 1
                if number >= len(self._chunks) or self._is_closed or self.error is not None:
                    return
            try:
                self._fill(buffer.memory, self._chunks[number])
            except BaseException as error:
                with self._changed:
                    self.error = self.error or error
                    self._changed.notify_all()
                return
            with self._changed:
                self._read_chunks[number] = buffer
                self._changed.notify_all()

    def _fill(self, memory: Tensor, pieces: list[_Piece]) -> None:
        at = 0
        for piece in pieces:
            self._read_bytes(piece.name, piece.start, memory[at : at + piece.num_bytes])
            at += piece.num_bytes

    def _read_bytes(self, name: str, start: int, memory: Tensor) -> None:
        stored = self._stored[name]
        view, offset = memory.numpy().data, stored.offset + start
        while len(view):
            try:
                num_read = os.preadv(self._files[stored.path], [view], offset)
            except OSError as error:
                raise CheckpointError(
                    f"{stored.path} cannot be read", found=f"{error.strerror} at byte {offset}, in {name}"
                ) from error
            if num_read == 0:
                raise CheckpointError(
                    f"{stored.path} is cut short", found=f"{offset} bytes", hint="get the checkpoint again"
                )
            view, offset = view[num_read:], offset + num_read

    # Who takes tensors.

    def take(self, name: str) -> Tensor:
        """The tensor `name`, on the device; work enqueued on the current stream from now on finds it whole.

        Raises:
            CheckpointError: A file cannot be read, or has become shorter.
        """
        with self._lock:
            while name not in self._arrived and name not in self._gone:
                self._send_next()
            arrival = self._arrived.pop(name, None)
            if arrival is None:
                return self._read_alone(name)
            self._gone.add(name)
            self._send_ahead()
        if arrival.event is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(arrival.event)
            if stream != self._stream:
                arrival.tensor.record_stream(stream)
        return arrival.tensor

    def _send_next(self) -> None:
        """Send the next chunk on its way to the device."""
        number = self._next_to_send
        with self._changed:
            self._changed.wait_for(lambda: number in self._read_chunks or self.error or self._is_closed)
            if self.error is not None:
                raise self.error
            if self._is_closed:
                raise RuntimeError("the checkpoint's files have been closed")
            buffer = self._read_chunks.pop(number)
        self._next_to_send += 1
        pieces, at, whole = self._chunks[number], 0, []
        for piece in pieces:
            tensor = self._begun.get(piece.name)
            if tensor is None:
                tensor = self._begun[piece.name] = self._empty(piece.name)
            with _on(self._copies):
                place = tensor.view(-1).view(torch.uint8)[piece.start : piece.start + piece.num_bytes]
                place.copy_(buffer.memory[at : at + piece.num_bytes], non_blocking=True)
            at += piece.num_bytes
            if piece.start + piece.num_bytes == self._stored[piece.name].num_bytes:
                whole.append(piece.name)
        buffer.sent = None if self._copies is None else self._copies.record_event()
        for name in whole:
            self._arrived[name] = _Arrival(self._begun.pop(name), buffer.sent)
        self._free.put(buffer)
        self._let_go(set(whole))

    def _send_ahead(self) -> None:
        """Send what has been read, so that it is on its way while the caller works on the tensor that it was given."""
        limit = min(SENT_AHEAD_BYTES, self._held_bytes)
        taken = sum(self._stored[name].num_bytes for name in (*self._arrived, *self._begun))
        while self._next_to_send in self._read_chunks:
            chunk = self._chunks[self._next_to_send]
            taken += sum(self._stored[piece.name].num_bytes for piece in chunk if piece.start == 0)
            if taken > limit:
                return
            self._send_next()

    def _empty(self, name: str) -> Tensor:
        stored = self._stored[name]
        with _on(self._stream):
            tensor = torch.empty(stored.shape, dtype=stored.dtype, device=self._device)
        if self._stream is not None and self._copies is not None:
            # The memory may be what earlier work is still reading.
            self._copies.wait_stream(self._stream)
        return tensor

    def _let_go(self, newest: set[str]) -> None:
        """Of the tensors that nobody has asked for, let the oldest go, down to what may be held."""
        held = sum(self._stored[name].num_bytes for name in self._arrived if name not in newest)
        for name in [name for name in self._arrived if name not in newest]:
            if held <= self._held_bytes:
                return
            arrival = self._arrived.pop(name)
            if self._stream is not None and arrival.event is not None:
                self._stream.wait_event(arrival.event)
            self._gone.add(name)
            held -= self._stored[name].num_bytes

    def _read_alone(self, name: str) -> Tensor:
        """A tensor that has been taken or let go before."""
        stored = self._stored[name]
        if self._is_closed:
            raise RuntimeError("the checkpoint's files have been closed")
        tensor = torch.empty(stored.shape, dtype=stored.dtype, device="cpu")
        if stored.num_bytes:
            self._read_bytes(name, 0, tensor.view(-1).view(torch.uint8))
        return tensor.to(self._device)


def _on(stream: torch.cuda.Stream | None) -> AbstractContextManager[object]:
    return contextlib.nullcontext() if stream is None else torch.cuda.stream(stream)


def _chunks(stored: Mapping[str, StoredTensor], chunk_bytes: int) -> list[list[_Piece]]:
    """The tensors in the order in which they will be taken, cut and put together to chunks."""
    chunks: list[list[_Piece]] = [[]]
    room = chunk_bytes
    for name in sorted(stored, key=natural_key):
        for piece in _pieces(name, stored[name].num_bytes, room, chunk_bytes):
            if piece.num_bytes > room:
                chunks.append([])
                room = chunk_bytes
            chunks[-1].append(piece)
            room -= piece.num_bytes
    return chunks


def _pieces(name: str, num_bytes: int, room: int, chunk_bytes: int) -> Iterator[_Piece]:
    """The first one fills what room there is; a tensor of no bytes is one piece, too."""
    start, size = 0, min(num_bytes, room or chunk_bytes)
    yield _Piece(name, start, size)
    while (start := start + size) < num_bytes:
        size = min(num_bytes - start, chunk_bytes)
        yield _Piece(name, start, size)


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _host_memory(size: int, *, is_pinned: bool) -> Tensor:
    """A buffer that the GPU copies from by itself, where the system gives such memory."""
    if is_pinned:
        try:
            return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            say_once(logger, f"weights are copied from memory that is not pinned, which is slower: {reason}")
    return torch.empty(size, dtype=torch.uint8, device="cpu")
