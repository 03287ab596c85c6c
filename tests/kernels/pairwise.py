"""Few cases of many: on a GPU each compiles kernels of its own, and faults come from two values that meet."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

__all__ = ["pairwise"]


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Cases, each a value of every axis, in which any two values of two axes meet; always the same ones."""
    every = list(itertools.product(*(range(len(axis)) for axis in axes)))

    def pairs(case: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(itertools.combinations(enumerate(case), 2))

    missing = set().union(*map(pairs, every))
    cases = []
    while missing:
        best = max(every, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        cases.append(tuple(axis[index] for axis, index in zip(axes, best, strict=True)))
    return cases
