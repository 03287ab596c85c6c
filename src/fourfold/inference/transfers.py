"""Numbers on their way between host and device, while neither waits for the other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["Arriving", "to_device"]


def to_device(values: Sequence[Any], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Numbers as a tensor on `device`. The host goes on at once, whatever the device still has to do."""
    held = torch.tensor(values, dtype=dtype)
    if torch.device(device).type != "cuda":
        return held.to(device)
    return held.pin_memory().to(device, non_blocking=True)


class Arriving:
    """Tensors that are being copied to the host.

    Args:
        tensors: On one device, as its work so far leaves them.
    """

    def __init__(self, *tensors: Tensor) -> None:
        self._copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
        self._event: torch.cuda.Event | None = None
        if tensors and tensors[0].is_cuda:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(tensors[0].device))

    def wait(self) -> list[Tensor]:
        """The tensors on the host, when they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._copies
