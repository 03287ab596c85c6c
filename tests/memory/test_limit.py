"""A limit on what a process takes of a GPU: planned for, set in torch's allocator, and taken back."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fourfold.errors import ConfigError
from fourfold.memory.gpus import (
    CONTEXT_BYTES,
    FRAGMENTATION,
    LARGEST_CONTEXT_BYTES,
    POOLS_BYTES,
    context_bytes,
    gpu_present,
)
from fourfold.memory.limit import memory_limit

GIB = 2**30
CUDA = torch.device("cuda", 0)


class Card:
    """A GPU of 80 GiB that is not there."""

    total = 80 * GIB

    def __init__(self) -> None:
        self.others = 0
        self.context = 500 * 2**20
        self.reserved = 0
        self.allocated = 0
        self.fraction = 1.0
        self.fractions: list[float] = []

    def mem_get_info(self, _: Any = None) -> tuple[int, int]:
        return self.total - self.others - self.context - self.reserved, self.total

    def set_fraction(self, fraction: float, index: int) -> None:
        assert index == 0
        assert 0 <= fraction <= 1
        self.fraction = fraction
        self.fractions.append(fraction)


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Card:
    made = Card()
    for name, value in {
        "is_available": lambda: True,
        "current_device": lambda: 0,
        "get_device_name": lambda _=None: "NVIDIA H100 80GB HBM3",
        "get_device_properties": lambda _: SimpleNamespace(total_memory=made.total),
        "mem_get_info": made.mem_get_info,
        "memory_reserved": lambda _=None: made.reserved,
        "memory_allocated": lambda _=None: made.allocated,
        "get_per_process_memory_fraction": lambda _: made.fraction,
        "set_per_process_memory_fraction": made.set_fraction,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return made


def test_the_allocator_gets_what_the_process_itself_leaves_of_the_limit(card: Card) -> None:
    with memory_limit(CUDA, 8 * GIB):
        assert int(card.fraction * card.total) == pytest.approx(8 * GIB - CONTEXT_BYTES, abs=1)
    assert card.fraction == 1.0


def test_it_is_taken_back_after_an_error_too_and_several_runs_do_not_add_up(card: Card) -> None:
    for _ in range(2):
        with pytest.raises(RuntimeError), memory_limit(CUDA, 8 * GIB):
            raise RuntimeError
    assert card.fractions == [card.fractions[0], 1.0] * 2


def test_a_cap_of_the_callers_own_stays(card: Card) -> None:
    card.fraction = 0.05
    with memory_limit(CUDA, 8 * GIB):
        assert card.fraction == 0.05
    assert card.fraction == 0.05


def test_off_gpus_and_without_a_limit_nothing_is_set(card: Card) -> None:
    with memory_limit(torch.device("cpu"), 8 * GIB), memory_limit(CUDA, None):
        pass
    assert card.fractions == []


def test_a_limit_above_the_card_is_refused_with_both_numbers(card: Card) -> None:
    with (
        pytest.raises(ConfigError, match=r"gpu_memory_limit: 96\.00 GiB(.|\n)*80\.00 GiB"),
        memory_limit(CUDA, 96 * GIB),
    ):
        pass
    with pytest.raises(ConfigError, match=r"96\.00 GiB(.|\n)*80\.00 GiB"):
        gpu_present(CUDA, 96 * GIB)


def test_a_limit_that_the_process_itself_takes_is_refused(card: Card) -> None:
    with pytest.raises(ConfigError, match=r"nothing for tensors(.|\n)*more than the process's own 0\.75 GiB"):
        gpu_present(CUDA, GIB // 2)
    assert card.fractions == []


def test_a_plan_is_for_a_card_as_large_as_the_limit(card: Card) -> None:
    gpu = gpu_present(CUDA, 8 * GIB)
    assert gpu is not None
    assert gpu.memory_bytes == 8 * GIB
    assert gpu.usable_bytes == int((8 * GIB - CONTEXT_BYTES - POOLS_BYTES) / (1 + FRAGMENTATION))
    assert gpu.name == "8 GB of an NVIDIA H100 80GB HBM3"
    # As fast as the card is.
    assert gpu.matmul_rate == 989e12


def test_what_others_hold_and_a_cap_that_stands_are_left_out_of_a_plan(card: Card) -> None:
    whole = gpu_present(CUDA)
    assert whole is not None
    assert whole.memory_bytes == pytest.approx(80 * GIB, abs=200 * 2**20)
    card.others = 75 * GIB
    beside = gpu_present(CUDA, 8 * GIB)
    assert beside is not None
    assert beside.memory_bytes - beside.context_bytes == card.mem_get_info()[0] < 5 * GIB
    card.others, card.fraction = 0, 0.1
    capped = gpu_present(CUDA)
    assert capped is not None
    assert capped.memory_bytes == 8 * GIB + CONTEXT_BYTES


def test_tensors_that_others_hold_in_this_process_are_left_out_and_the_runs_own_are_not(card: Card) -> None:
    card.reserved, card.allocated = 5 * GIB, 4 * GIB
    before, under_way = gpu_present(CUDA, 8 * GIB), gpu_present(CUDA, 8 * GIB, held_bytes=3 * GIB)
    assert before is not None
    assert under_way is not None
    assert before.memory_bytes == 4 * GIB
    assert under_way.memory_bytes == 7 * GIB


def test_the_process_itself_takes_what_is_measured_within_what_is_known(card: Card) -> None:
    assert context_bytes(CUDA) == CONTEXT_BYTES
    card.context = 900 * 2**20
    card.reserved = 3 * GIB
    assert context_bytes(CUDA) == 900 * 2**20
    card.others = 40 * GIB
    assert context_bytes(CUDA) == LARGEST_CONTEXT_BYTES


@pytest.mark.gpu
def test_the_allocator_refuses_what_is_beyond_the_limit_and_only_within() -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    limit = torch.cuda.memory_reserved() + context_bytes() + GIB
    with memory_limit(CUDA, limit):
        held = [torch.empty(2**29, dtype=torch.uint8, device="cuda")]
        with pytest.raises(torch.OutOfMemoryError):
            held.append(torch.empty(2**30, dtype=torch.uint8, device="cuda"))
        assert torch.cuda.max_memory_reserved() <= limit - CONTEXT_BYTES
    held.append(torch.empty(2**30, dtype=torch.uint8, device="cuda"))
    del held
    torch.cuda.empty_cache()
