"""Whether Triton kernels can run on a tensor's device, and the one line that says why not."""

from __future__ import annotations

import functools
import importlib.util
import logging

import torch
from torch import Tensor

__all__ = ["say_once", "triton_refuses"]


@functools.cache
def _device_refuses(index: int) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.version.hip is not None:
        return None
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        return f"{torch.cuda.get_device_name(index)} has compute capability {major}.{minor}; the kernels need 8.0"
    return None


def triton_refuses(tensor: Tensor) -> str | None:
    """Why no Triton kernel runs on the tensor's device; None where they run."""
    if tensor.device.type != "cuda":
        return f"there are no Triton kernels for {tensor.device.type}"
    return _device_refuses(tensor.device.index)


@functools.cache
def say_once(logger: logging.Logger, message: str) -> None:
    """Logs a warning the first time it is said."""
    logger.warning(message)
