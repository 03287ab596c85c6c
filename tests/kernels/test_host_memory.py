"""Page-locked host memory, where there is none and where it is refused; see tests/models for it on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fourfold.errors import TrainingError
from fourfold.kernels import host_memory


def test_locked_memory_that_is_refused_is_told_with_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    class Runtime:
        class cudaError:  # noqa: N801
            success = 0

        def cudaHostRegister(self, *_: Any) -> int:  # noqa: N802
            return 2

    monkeypatch.setattr(torch.cuda, "cudart", Runtime)
    monkeypatch.setattr(host_memory, "_forget_last_error", lambda: None)
    with pytest.raises(TrainingError, match=r"refused: 300 MiB for layer 1(.|\n)*CUDA error 2(.|\n)*ulimit -l"):
        host_memory.HostBuffer(300 * 2**20, pinned=True, purpose="layer 1")


def test_the_memory_that_is_there_is_a_positive_number_or_unknown() -> None:
    available = host_memory.available_bytes()
    assert available is None or 2**20 < available < 2**50


def test_a_size_is_rounded_to_whole_pages() -> None:
    assert host_memory.rounded_to_pages(0) == 0
    assert host_memory.rounded_to_pages(1) == host_memory.rounded_to_pages(4096) <= 65536
    assert host_memory.HostBuffer(5, pinned=False, purpose="a test").data.shape == (5,)
