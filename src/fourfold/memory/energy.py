"""What a GPU used of energy, where NVIDIA's management library (NVML) tells it."""

from __future__ import annotations

import contextlib
import importlib
from typing import Any

import torch

__all__ = ["EnergyMeter"]


class EnergyMeter:
    """Counts a GPU's joules from when it is made.

    NVML counts the energy of the whole card, by whatever runs on it, since Volta (compute capability 7.0). A CPU, an
    older card, or an installation without the module `pynvml` tells nothing.

    Args:
        device: What computes.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._nvml, self._handle = _handle(torch.device(device))
        self._begun = self._millijoules()

    def joules(self) -> float | None:
        """Since the meter was made; None: not told."""
        now = self._millijoules()
        return None if now is None or self._begun is None else (now - self._begun) / 1000

    def _millijoules(self) -> int | None:
        if self._handle is None:
            return None
        try:
            return int(self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle))
        except self._nvml.NVMLError:
            return None


def _handle(device: torch.device) -> tuple[Any, Any]:
    """The library and its name for the device; (None, None) where there is none."""
    if device.type != "cuda":
        return None, None
    try:
        nvml = importlib.import_module("pynvml")
    except ImportError:
        return None, None
    with contextlib.suppress(nvml.NVMLError):
        nvml.nvmlInit()
        # By its UUID: NVML counts cards in an order of its own, and knows nothing of CUDA_VISIBLE_DEVICES.
        uuid = torch.cuda.get_device_properties(device).uuid
        return nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    return None, None
