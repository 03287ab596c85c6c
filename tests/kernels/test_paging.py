from __future__ import annotations

import mmap
from types import SimpleNamespace

import pytest
import torch

from fourfold.errors import TrainingError
from fourfold.kernels.paging import NUM_SLOTS, Page, Pager, host_zeros

CPU = torch.device("cpu")


def pages_of(numbers: torch.Tensor, size: int) -> list[Page]:
    codes = numbers.to(torch.uint8)
    return [
        Page(start, 1, (numbers[start : start + size], codes[start : start + size]))
        for start in range(0, len(numbers), size)
    ]


@pytest.mark.parametrize("size", [1, 7, 100, 1000])
def test_each_page_is_worked_on_once_a_turn_and_goes_back(size: int) -> None:
    numbers = torch.arange(1000, dtype=torch.float32)
    pages = pages_of(numbers, size)
    pager = Pager(pages, CPU)
    assert len(pager.slots) == min(NUM_SLOTS, len(pages))
    for _ in range(2):
        for page, (values, codes) in pager.turn(pages):
            assert torch.equal(values, page.home[0])
            assert values.data_ptr() % 16 == codes.data_ptr() % 16 == 0
            values += 1
            codes.zero_()
    pager.settle()
    assert torch.equal(numbers, torch.arange(1000) + 2.0)
    assert all(not page.home[1].any() for page in pages)


def test_pinned_memory_refused_says_how_much_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(address: int, num_bytes: int, flags: int) -> int:
        assert address % mmap.PAGESIZE == num_bytes % mmap.PAGESIZE == flags == 0
        return 2

    monkeypatch.setattr(torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=refuse))
    with pytest.raises(TrainingError, match=r"400,000 bytes of pinned memory(.|\n)*error 2(.|\n)*paged_adamw_8bit"):
        host_zeros(100_000, torch.float32, torch.device("cuda"))


def test_more_memory_than_the_host_has_is_refused_alike() -> None:
    with pytest.raises(TrainingError, match="pinned memory"):
        host_zeros(1 << 60, torch.uint8, torch.device("cuda"))


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
