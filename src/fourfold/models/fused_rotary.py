"""The angles of the rotary embedding, which all layers share, by one kernel."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fourfold.kernels.angles import rotary_angles

__all__ = ["FusedRotary"]


class FusedRotary:
    """Mixin over a Transformers rotary embedding; frequencies that change with the positions go its own way."""

    inv_freq: Tensor
    attention_scaling: float
    rope_type: Any

    def forward(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        changes = not isinstance(self.rope_type, str) or "dynamic" in self.rope_type or self.rope_type == "longrope"
        if args or kwargs or changes or self.inv_freq.device != x.device:
            own: tuple[Tensor, Tensor] = super().forward(x, position_ids, *args, **kwargs)  # type: ignore[misc]
            return own
        return rotary_angles(position_ids, self.inv_freq, self.attention_scaling, x.dtype)
