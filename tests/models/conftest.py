from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# Lets the tests of this folder share `decoders`, and `twins`, models of equal weights, and `pairwise`.
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "adapters"), str(HERE.parent / "kernels")]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The tiny models lose more by waking threads than they win."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
