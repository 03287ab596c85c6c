"""What tests of kernels on a GPU share."""

from __future__ import annotations

import torch
from torch import Tensor


def relative_error(out: Tensor, reference: Tensor) -> float:
    """||out - reference|| / ||reference||; `out` must be finite."""
    assert out.isfinite().all()
    return float((out.double() - reference.double()).norm() / reference.double().norm())


def poison() -> None:
    """Leaves NaN in the memory that the next allocations get, so that an element that is not written shows."""
    buffers = [torch.full((1 << size,), torch.nan, device="cuda") for size in range(8, 26)]
    del buffers
