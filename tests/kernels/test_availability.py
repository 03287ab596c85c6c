"""Why a kernel does not run, and that it is said once."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import pytest
import torch

from fourfold.kernels import availability
from fourfold.kernels.availability import say_once, triton_refuses


@pytest.fixture(autouse=True)
def nothing_remembered() -> Any:
    availability._refusal.cache_clear()
    yield
    availability._refusal.cache_clear()


class OnGpu:
    """What is asked of a tensor, for a machine without a GPU."""

    device = torch.device("cuda", 0)


def test_a_tensor_on_the_cpu_is_refused() -> None:
    assert "not for cpu" in str(triton_refuses(torch.zeros(1)))


@pytest.mark.parametrize(
    ("capability", "reason"),
    [((7, 5), "compute capability 7.5 is below 8.0"), ((8, 0), None), ((9, 0), None), ((12, 0), None)],
)
def test_a_gpu_is_refused_by_its_compute_capability(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert triton_refuses(OnGpu()) == reason  # type: ignore[arg-type]


def test_a_gpu_without_triton_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert triton_refuses(OnGpu()) == "Triton is not installed"  # type: ignore[arg-type]


def test_a_message_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("fourfold.test_availability")
    for message in ("first", "second", "first", "second"):
        say_once(logger, message)
    assert caplog.messages == ["first", "second"]
