"""Decode passes as CUDA graphs: what a CPU can see of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fourfold.inference.decode_graphs import BUCKETS, GraphedStep, fill


class Counting:
    """A step that tells which rows it was given."""

    vocab_size = 7

    def __init__(self) -> None:
        self.calls: list[int] = []

    def prefill(self, slot: int, input_ids: Tensor, cache: Any, adapter: str | None, start: int = 0) -> Tensor:
        return torch.full((self.vocab_size,), float(slot + start))

    def decode(self, tokens: Tensor, slots: Tensor, positions: Tensor, cache: Any, adapter: str | None) -> Tensor:
        self.calls.append(len(tokens))
        return (tokens + slots + positions)[:, None].expand(-1, self.vocab_size).float()


def test_on_a_cpu_it_is_the_step_itself() -> None:
    step = Counting()
    graphed = GraphedStep(step)
    cache = SimpleNamespace(version=0)
    rows = torch.arange(3)
    assert torch.equal(graphed.decode(rows, rows, rows, cache, None), step.decode(rows, rows, rows, cache, None))
    assert step.calls == [3, 3]
    assert graphed.vocab_size == 7
    assert graphed.prefill(2, rows, cache, None, start=4)[0] == 6
    with pytest.raises(AttributeError):
        graphed.missing  # noqa: B018


@pytest.mark.parametrize("rows", [1, 3, 4])
def test_rows_that_are_left_over_repeat_the_first(rows: int) -> None:
    inputs = torch.full((3, 4), -1)
    given = torch.arange(3 * rows).view(3, rows)
    fill(inputs, *given)
    assert torch.equal(inputs[:, :rows], given)
    assert (inputs[:, rows:] == given[:, :1]).all()


def test_buckets_rise() -> None:
    assert list(BUCKETS) == sorted(set(BUCKETS))
