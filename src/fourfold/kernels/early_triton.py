"""Launches that begin while the one before them is ending (programmatic dependent launch, from compute capability 9.0).

Such a launch may load what is there since long before, such as weights, and then waits until the launch before it has
ended, and with it all those before that one. When the next launch may begin, it says itself. For few rows of x a launch
is short, and has much of the GPU to spare: the next one is let begin at once, and loads its weights meanwhile. With
more rows its programs would take the room of those that still have work, and it begins when the wait is over.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["AT_ONCE_ROWS", "begin", "wait"]

# Of x, up to which the next launch may begin at once: 1 row 2.11 ms a step beside 2.16, 8 rows 3.48 beside 3.07.
AT_ONCE_ROWS = 2


@triton.jit
def begin(EARLY: tl.constexpr, AT_ONCE: tl.constexpr) -> None:
    """The first that a kernel does."""
    if EARLY and AT_ONCE:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def wait(EARLY: tl.constexpr, AT_ONCE: tl.constexpr) -> None:
    """Until the launch before has ended: before the first activation is read, and before anything is written."""
    if EARLY:
        tl.extra.cuda.gdc_wait()
        if not AT_ONCE:
            tl.extra.cuda.gdc_launch_dependents()
