from __future__ import annotations

import pytest
import torch

from fourfold.errors import TrainingError
from fourfold.kernels import paging
from fourfold.kernels.paging import NUM_SLOTS, Page, Pager, host_buffer

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


def test_memory_that_the_host_does_not_have_is_refused_before_it_is_touched() -> None:
    for device in ("cpu", "cuda"):
        with pytest.raises(TrainingError, match=r"no 1,152,\d+,\d+,\d+,\d+,\d+ bytes(.|\n)*paged_adamw_8bit"):
            host_buffer(1 << 60, torch.device(device))


def test_pinned_memory_refused_says_how_much_and_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise TrainingError("page-locked host memory was refused", found="CUDA error 2", hint="use less")

    monkeypatch.setattr(paging, "HostBuffer", refuse)
    with pytest.raises(TrainingError, match=r"refused(.|\n)*error 2, for 400,000 bytes(.|\n)*optim: adamw_8bit"):
        host_buffer(400_000, torch.device("cuda"))


def test_host_memory_starts_as_zeros() -> None:
    torch.full((1 << 16,), 255, dtype=torch.uint8)
    assert not host_buffer(1 << 16, CPU).data.any()
