from __future__ import annotations

import pytest
import torch

from fourfold.kernels.paging import NUM_SLOTS, Page, Pager

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
