"""What of the graphs of fused blocks needs no GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fourfold.models.graphs import _Graph


def graph_of(grads: list[Tensor | None]) -> _Graph:
    nothing: Any = None
    sums = [grad.reshape(-1) for grad in grads if grad is not None]
    shapes = [None if grad is None else grad.shape for grad in grads]
    return _Graph(nothing, torch.empty(0), torch.empty(0), sums, shapes, [], nothing, nothing, needs_x=True)


def test_gradients_are_those_of_the_replay_in_memory_of_their_own() -> None:
    # One among them frozen; one transposed.
    for grads in ([None, torch.randn(3, 4), None, torch.randn(5, 2).T], [torch.randn(7, 1)]):
        expected = [None if grad is None else grad.clone() for grad in grads]
        graph = graph_of(grads)
        found = graph.gradients()
        # The next replay.
        for sums in graph.sums:
            sums.fill_(torch.nan)
        assert len(found) == len(expected)
        for grad, wanted in zip(found, expected, strict=True):
            assert grad is None if wanted is None else (grad is not None and torch.equal(grad, wanted))


def test_a_block_without_trained_adapters_has_no_gradients() -> None:
    assert graph_of([None, None]).gradients() == [None, None]
