"""Optimizers that keep moments of each element: their bits, and where they live."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, TypedDict

import torch
from torch import Tensor

from fourfold.kernels.optimizer import optimizer_step
from fourfold.kernels.optimizer_state import Entry, Hyperparameters, OptimizerState, lay_out, moment_bytes, order
from fourfold.kernels.paging import NUM_SLOTS, PAGE_BYTES
from fourfold.optimizers.base import OwnOptimizer
from fourfold.optimizers.maps import state_maps

__all__ = ["PLACEMENTS", "MomentOptimizer", "StateOptions", "state_bits_of"]

PLACEMENTS = ("resident", "paged")

# Left to others where state takes the GPU's free memory.
_RESERVE_BYTES = 2**30


class StateOptions(TypedDict, total=False):
    """How moments are kept.

    Attributes:
        state_bits: 32 (by default) or 8: blockwise over the dynamic map (https://arxiv.org/abs/2110.02861).
        min_8bit_size: Parameters with fewer elements keep 32-bit state (4096 by default).
        placement: "resident": with the parameters (by default). "paged": in the host's pinned memory, brought to the
            device page by page within a step, beside the work on other pages. The numbers are the same, bit for bit.
        resident_bytes: Of paged moments and scales, what may stay on the device all the same, whole parameters; 0 by
            default. None: what the GPU has free at the first step, less 1 GiB.
        page_bytes: Size of a page; three of them are held on the device (64 MiB by default).
        max_grad_norm: See `OwnOptimizer`.
    """

    state_bits: int
    min_8bit_size: int
    placement: str
    resident_bytes: int | None
    page_bytes: int
    max_grad_norm: float | None


def state_bits_of(numel: int, state_bits: int, min_8bit_size: int) -> int:
    """Bits of the moments of a parameter of `numel` elements: 8 or 32."""
    return 8 if state_bits == 8 and numel >= min_8bit_size else 32


def page_out(rule: str, entries: Sequence[Entry], room: int) -> list[Entry]:
    """The entries in their order, all paged but for parameters next to each other whose moments take `room` bytes."""
    placed = list[Entry]()
    for entry in sorted(entries, key=order):
        taken = moment_bytes(rule, entry.bits, entry.param.numel())
        if taken > room and placed and not placed[-1].paged:
            room = 0  # a second stretch of resident ones would cost launches of its own
        placed.append(entry._replace(paged=taken > room))
        room -= 0 if placed[-1].paged else taken
    return placed


class MomentOptimizer(OwnOptimizer):
    """An optimizer of one update rule over the state of `fourfold.kernels.optimizer_state`.

    Args:
        params, defaults: See `OwnOptimizer`; defaults are lr, betas, weight_decay and what else the rule has.
        state_bits, ...: See `StateOptions`.

    Raises:
        ConfigError: A value out of its range.
    """

    rule: ClassVar[str]

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        state_bits: int = 32,
        min_8bit_size: int = 4096,
        placement: str = "resident",
        resident_bytes: int | None = 0,
        page_bytes: int = PAGE_BYTES,
        max_grad_norm: float | None = None,
    ) -> None:
        for key, value, holds, allowed in (
            ("lr", defaults["lr"], defaults["lr"] >= 0, "0 or more"),
            ("betas", defaults["betas"], all(0 <= beta < 1 for beta in defaults["betas"]), "0 <= beta < 1"),
            ("weight_decay", defaults["weight_decay"], defaults["weight_decay"] >= 0, "0 or more"),
            ("state_bits", state_bits, state_bits in (8, 32), "8 or 32"),
            ("placement", placement, placement in PLACEMENTS, " or ".join(PLACEMENTS)),
            ("resident_bytes", resident_bytes, resident_bytes is None or resident_bytes >= 0, "0 or more, or None"),
            ("page_bytes", page_bytes, page_bytes >= 1, "1 or more"),
        ):
            self._require(key, value, holds, allowed)
        super().__init__(params, defaults, max_grad_norm)
        self.state_bits = state_bits
        self.min_8bit_size = min_8bit_size
        self.placement = placement
        self.resident_bytes = resident_bytes
        self.page_bytes = page_bytes

    def _hyperparameters(self, group: dict[str, Any]) -> Hyperparameters:
        beta1, beta2 = group["betas"]
        return Hyperparameters(group["lr"], beta1, beta2, group.get("eps", 0.0), group["weight_decay"])

    def _lay_out(self, params: Sequence[tuple[Tensor, int]]) -> OptimizerState:
        device = params[0][0].device
        entries = [
            # Of a part, as many as of the whole.
            Entry(param, group, state_bits_of(self.owner(param).numel(), self.state_bits, self.min_8bit_size))
            for param, group in params
        ]
        if self.placement == "paged":
            entries = page_out(self.rule, entries, self._room(device))
        return lay_out(entries, state_maps(device), self.rule, self.page_bytes)

    def _room(self, device: torch.device) -> int:
        """Bytes of paged moments that stay on the device."""
        if self.resident_bytes is not None:
            return self.resident_bytes
        if device.type != "cuda":
            return 0
        free, total = torch.cuda.mem_get_info(device)
        # A cap on the process counts what PyTorch holds, used or not.
        under_cap = int(torch.cuda.get_per_process_memory_fraction(device) * total) - torch.cuda.memory_reserved(device)
        return max(0, min(free, under_cap) - _RESERVE_BYTES - NUM_SLOTS * self.page_bytes)

    def _update(self, grads: Sequence[Tensor | None]) -> None:
        state = self._flat()
        assert isinstance(state, OptimizerState)
        groups = [self._hyperparameters(group) for group in self.param_groups]
        optimizer_step(state, grads, groups, self.max_grad_norm, self.watched_loss, self._group)
