"""Means of what is logged, counted on the device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ["Means"]


class Means:
    """Sums and numbers by name, as tensors on the device, so that counting never waits for it."""

    def __init__(self) -> None:
        self._sums: dict[str, tuple[Tensor, Tensor | int]] = {}

    def add(self, name: str, values: Tensor, number: Tensor | int | None = None) -> None:
        """Count values, of any shape; `number`: how many of them there are where others are 0 for being none."""
        total, count = self._sums.get(name, (torch.zeros((), device=values.device), 0))
        self._sums[name] = total + values.detach().sum(), count + (values.numel() if number is None else number)

    def sums(self) -> dict[str, Tensor | float]:
        """All of it, by names that `from_sums` reads."""
        named: dict[str, Tensor | float] = {}
        for name, (total, number) in self._sums.items():
            named |= {f"sum:{name}": total, f"number:{name}": number}
        return named

    @classmethod
    def from_sums(cls, sums: Mapping[str, Any]) -> Means:
        """Means that count on from there."""
        made = cls()
        names = [name.removeprefix("sum:") for name in sums if name.startswith("sum:")]
        made._sums = {name: (sums[f"sum:{name}"], sums[f"number:{name}"]) for name in names}
        return made

    def take(self, accelerator: Any, device: torch.device) -> dict[str, float]:
        """The means over all processes since the last call, of what there was any of."""
        taken, self._sums = self._sums, {}
        if not taken:
            return {}
        dtype = torch.float32 if device.type == "mps" else torch.float64
        pairs = torch.stack([torch.as_tensor(v).to(device, dtype) for pair in taken.values() for v in pair])
        totals = accelerator.reduce(pairs, reduction="sum").view(-1, 2).tolist()
        return {name: total / count for name, (total, count) in zip(taken, totals, strict=True) if count}
