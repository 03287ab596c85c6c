"""Whether Triton's kernels can serve a tensor, and saying once why they do not."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch
from torch import Tensor

__all__ = ["MINIMUM_CAPABILITY", "say_once", "triton_refuses"]

# Ampere: the first with bf16 on its tensor cores.
MINIMUM_CAPABILITY = (8, 0)


def triton_refuses(tensor: Tensor) -> str | None:
    """Why no Triton kernel can serve `tensor` where it lies, or None if one can. Asked once a device."""
    return _refusal(tensor.device)


@functools.cache
def _refusal(device: torch.device) -> str | None:
    if device.type != "cuda":
        return f"Triton's kernels are for CUDA GPUs, not for {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    capability = torch.cuda.get_device_capability(device)
    if capability < MINIMUM_CAPABILITY:
        found, needed = (".".join(map(str, version)) for version in (capability, MINIMUM_CAPABILITY))
        return f"compute capability {found} is below {needed}"
    return None


def say_once(logger: logging.Logger, message: str) -> None:
    """Log `message` as a warning, the first time that this logger is given it."""
    _say(logger, message)


@functools.cache
def _say(logger: logging.Logger, message: str) -> None:
    logger.warning(message)
