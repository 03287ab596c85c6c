from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from fourfold.errors import CheckpointError
from fourfold.models import reading_ahead
from fourfold.models.checkpoint_files import stored_tensors
from fourfold.models.reading_ahead import ReadAhead

CPU = torch.device("cpu")


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """Of all dtypes and of sizes that fit a chunk, fill it, and take many."""
    generator = torch.Generator().manual_seed(0)
    made = {
        f"layers.{index}.weight": torch.randn(size, generator=generator)
        for index, size in enumerate([1, 7, 64, 65, 300, 0, 128, 63, 1000, 2, 2, 2])
    }
    for dtype in (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8):
        made[f"of.{dtype}".replace("torch.", "")] = (torch.randn(5, 3, generator=generator) * 100).to(dtype)
    made["of.bool"] = torch.rand(9, generator=generator) > 0.5
    made["of.uint8"] = torch.arange(200, dtype=torch.uint8)
    made["scalar"] = torch.tensor(2.5)
    return made


def write(folder: Path, tensors: dict[str, Tensor]) -> Any:
    save_file(tensors, folder / "model.safetensors")
    stored = stored_tensors(folder)
    assert stored is not None
    return stored


def same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


ORDERS: dict[str, Callable[[list[str]], list[str]]] = {
    "natural": lambda names: sorted(names, key=reading_ahead.natural_key),
    "reversed": lambda names: sorted(names, key=reading_ahead.natural_key, reverse=True),
    "every other": lambda names: names[::2],
    "twice": lambda names: names + names,
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("held_bytes", [0, 500, 2**30])
@pytest.mark.parametrize(("chunk_bytes", "num_buffers", "num_threads"), [(256, 1, 1), (256, 3, 5), (2**20, 4, 2)])
def test_tensors_come_whole_in_any_order(
    tmp_path: Path,
    tensors: dict[str, Tensor],
    order: str,
    held_bytes: int,
    chunk_bytes: int,
    num_buffers: int,
    num_threads: int,
) -> None:
    sizes = {"chunk_bytes": chunk_bytes, "num_buffers": num_buffers, "num_threads": num_threads}
    with ReadAhead(write(tmp_path, tensors), CPU, held_bytes=held_bytes, **sizes) as reader:
        for name in ORDERS[order](list(tensors)):
            assert same(reader.tensors[name][...], tensors[name]), name
        assert sum(arrival.tensor.nbytes for arrival in reader._arrived.values()) <= held_bytes + chunk_bytes


@pytest.mark.parametrize(("limit", "names"), [(2**20, ["b", "c", "d"]), (1500, ["b", "c"]), (0, [])])
def test_what_has_been_read_is_sent_while_the_caller_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int, names: list[str]
) -> None:
    monkeypatch.setattr(reading_ahead, "SENT_AHEAD_BYTES", limit)
    stored = write(tmp_path, {name: torch.zeros(600, dtype=torch.uint8) for name in "abcd"})
    with ReadAhead(stored, CPU, chunk_bytes=600) as reader:
        while len(reader._read_chunks) < 4:
            time.sleep(0.001)
        reader.take("a")
        assert list(reader._arrived) == names


def test_several_threads_take_at_once(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    with (
        ReadAhead(write(tmp_path, tensors), CPU, chunk_bytes=64, num_buffers=3, num_threads=3) as reader,
        ThreadPoolExecutor(6) as pool,
    ):
        names = list(tensors) * 3
        taken = list(pool.map(lambda name: reader.tensors[name][...], names))
    assert all(same(tensor, tensors[name]) for name, tensor in zip(names, taken, strict=True))


def test_lazy_tensors_say_what_those_of_safetensors_say(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    with (
        ReadAhead(write(tmp_path, tensors), CPU) as reader,
        safe_open(tmp_path / "model.safetensors", framework="pt") as file,
    ):
        for name, lazy in reader.tensors.items():
            slice_ = file.get_slice(name)
            assert (lazy.get_shape(), lazy.get_dtype()) == (slice_.get_shape(), slice_.get_dtype())
        assert same(reader.tensors["layers.8.weight"][3:9], tensors["layers.8.weight"][3:9])


def test_nothing_is_read_that_would_find_no_buffer(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[int] = []
    preadv = os.preadv

    def counted(descriptor: int, views: Any, offset: int) -> int:
        reads.append(len(views[0]))
        return preadv(descriptor, views, offset)

    monkeypatch.setattr(reading_ahead.os, "preadv", counted)
    with ReadAhead(write(tmp_path, tensors), CPU, chunk_bytes=256, num_buffers=2, num_threads=4):
        time.sleep(0.1)
        assert sum(reads) <= 2 * 256


def test_short_and_slow_reads_are_waited_for(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv = os.preadv

    def slow(descriptor: int, views: Any, offset: int) -> int:
        time.sleep(0.002)
        return preadv(descriptor, [views[0][:100]], offset)

    monkeypatch.setattr(reading_ahead.os, "preadv", slow)
    with ReadAhead(write(tmp_path, tensors), CPU, chunk_bytes=512) as reader:
        assert all(same(reader.tensors[name][...], tensors[name]) for name in tensors)


def test_who_waits_for_a_tensor_is_told_that_the_reading_has_failed(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    stored = write(tmp_path, tensors)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-60])
    with ReadAhead(stored, CPU, chunk_bytes=256, num_buffers=1) as reader:
        for _ in range(2):
            with pytest.raises(CheckpointError, match="cut short"):
                reader.take("scalar")
        assert isinstance(reader.error, CheckpointError)


def test_closing_ends_the_threads_and_whoever_waits(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    preadv, may_read, before = os.preadv, threading.Event(), threading.active_count()
    waiting: list[BaseException] = []

    def held(*args: Any) -> int:
        may_read.wait()
        return preadv(*args)

    def wait(reader: ReadAhead) -> None:
        try:
            _ = reader.tensors["scalar"][...]
        except RuntimeError as error:
            waiting.append(error)

    monkeypatch.setattr(reading_ahead.os, "preadv", held)
    with ReadAhead(write(tmp_path, tensors), CPU, chunk_bytes=64, num_buffers=3) as reader:
        waiter = threading.Thread(target=wait, args=(reader,))
        waiter.start()
        threading.Timer(0.1, may_read.set).start()
    waiter.join(5)
    assert "closed" in str(waiting[0])
    with pytest.raises(RuntimeError, match="closed"):
        reader.tensors["scalar"][...]
    time.sleep(0.05)
    assert threading.active_count() == before


def test_a_file_that_is_gone_leaves_no_other_open(tmp_path: Path, tensors: dict[str, Tensor]) -> None:
    stored = write(tmp_path, tensors)
    (tmp_path / "model.safetensors").unlink()
    before = set(Path("/proc/self/fd").iterdir()) if sys.platform == "linux" else set()
    with pytest.raises(OSError, match="model"), ReadAhead(stored, CPU):
        pass
    if sys.platform == "linux":
        assert set(Path("/proc/self/fd").iterdir()) == before


def test_memory_that_cannot_be_pinned_is_said_once_and_done_without(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    empty = torch.empty

    def refuse(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nmore")
        return empty(*size, **options)

    monkeypatch.setattr(reading_ahead.torch, "empty", refuse)
    for _ in range(2):
        assert len(reading_ahead._host_memory(16, is_pinned=True)) == 16
    assert caplog.text.count("not pinned") == 1


def test_a_host_without_memory_for_the_buffers_leaves_no_thread_and_no_file_behind(
    tmp_path: Path, tensors: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(size: int, *, is_pinned: bool) -> Tensor:
        raise RuntimeError("not enough memory")

    before = threading.active_count()
    monkeypatch.setattr(reading_ahead, "_host_memory", refuse)
    reader = ReadAhead(write(tmp_path, tensors), CPU)
    with pytest.raises(RuntimeError, match="not enough"):
        reader.__enter__()
    assert threading.active_count() == before
    assert not reader._files


MEASURED = """
import resource, sys, torch
from pathlib import Path
from fourfold.models.checkpoint_files import stored_tensors
from fourfold.models.reading_ahead import ReadAhead
stored = stored_tensors(Path(sys.argv[1]))
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
with ReadAhead(stored, torch.device("cpu")) as reader:
    for name in sorted(stored):
        assert not reader.tensors[name][...].any()
print((peak() - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss is the system's own")
def test_the_hosts_memory_holds_the_buffers_and_what_is_sent_ahead_at_most(tmp_path: Path) -> None:
    num_bytes, count = 32 * 2**20, 32
    header: dict[str, Any] = {
        f"t{index:02}": {
            "dtype": "U8",
            "shape": [num_bytes],
            "data_offsets": [index * num_bytes, (index + 1) * num_bytes],
        }
        for index in range(count)
    }
    text = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        # A hole: no disk is needed for it.
        file.truncate(8 + len(text) + count * num_bytes)
    command = [sys.executable, "-c", MEASURED, str(tmp_path)]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout)
    ring = reading_ahead.NUM_BUFFERS * reading_ahead.CHUNK_BYTES
    assert grown < ring + reading_ahead.SENT_AHEAD_BYTES + 2 * num_bytes + 40 * 2**20
    assert ring < 2**30
