from __future__ import annotations

import mmap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fourfold.errors import TrainingError
from fourfold.kernels import host_memory
from fourfold.kernels.host_memory import available_bytes, host_zeros


def test_pinned_memory_refused_says_how_much_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: int, num_bytes: int, flags: int) -> int:
        assert address % mmap.PAGESIZE == num_bytes % mmap.PAGESIZE == flags == 0
        return 2

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=refuse))
    with pytest.raises(TrainingError, match=r"400,000 bytes of pinned memory(.|\n)*error 2(.|\n)*paged_adamw_8bit"):
        host_zeros(100_000, torch.float32, torch.device("cuda"))


def test_more_memory_than_the_host_has_is_refused_before_it_is_touched() -> None:
    with pytest.raises(TrainingError, match=r"pinned memory(.|\n)*bytes available"):
        host_zeros(1 << 60, torch.uint8, torch.device("cuda"))


@pytest.mark.parametrize(("limit", "expected"), [("max", 8 << 30), (str(4 << 30), 3 << 30), (str(1 << 20), 0)])
def test_what_is_available_is_the_least_of_machine_and_control_group(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, limit: str, expected: int
) -> None:
    (tmp_path / "meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable:   {8 << 20} kB\nHugePages_Total:   0\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{3 << 29}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {1 << 29}\n")
    monkeypatch.setattr(host_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    assert available_bytes() == expected


def test_where_nothing_tells_there_is_no_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(host_memory, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(host_memory, "_CGROUP", tmp_path)
    assert available_bytes() == 2**63 - 1


def test_pinned_memory_is_let_go_with_the_tensor(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []

    def register(address: int, num_bytes: int, flags: int) -> int:
        held.append(address)
        return 0

    calls = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=held.remove)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: calls)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    tensor = host_zeros(1001, torch.float32, torch.device("cuda"))
    assert held == [tensor.data_ptr()]
    assert tensor.shape == (1001,)
    assert not tensor.any()
    del tensor
    assert held == []
