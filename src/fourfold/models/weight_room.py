"""Weights of decoder layers as a pass over a prompt multiplies them: dequantized, a layer's at a time.

All layers of a pass use the same memory in turn, so that a view of it is made once a pass and not once a layer. Nothing
but the order of one stream keeps them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fourfold.kernels.group_expansion import expand_group_
from fourfold.kernels.low_rank import extend, fill_columns, row_length
from fourfold.models.linear_group import ExtendedWeight, LinearGroup
from fourfold.quantization.linear import QuantizedLinear
from fourfold.quantization.tensor import QuantizedTensor, alike_parts, are_alike

__all__ = ["Expansion", "RoomyWeight", "WeightRoom"]

# Elements to whose multiples weights begin: a line of memory, as rows do.
_ALIGNMENT = 64


@dataclass(frozen=True)
class Expansion:
    """Linear layers that share an input, and what it takes to write their extended weight again and again.

    Args:
        group: The layers, whose weights and adapters stay where they are.
    """

    group: LinearGroup

    @cached_property
    def shape(self) -> tuple[int, int, int]:
        """Rows and columns of W, and the ranks beside it."""
        return self.group.out_features, self.group.in_features, self.group.rank

    @cached_property
    def num_elements(self) -> int:
        """Of the extended weight, to the end of its last row."""
        rows, columns, rank = self.shape
        return (rows + rank) * row_length(columns, rank)

    @cached_property
    def weights(self) -> list[QuantizedTensor]:
        """Of the layers that are quantized."""
        return [linear.base.quantized for linear in self.group.linears if isinstance(linear.base, QuantizedLinear)]

    @cached_property
    def parts(self) -> tuple[Any, ...] | None:
        """Codes, codebook, scales, map, nested scales, offsets, block size and that of the scales, as
        `expand_group_` takes them; None for layers that it does not take together."""
        weights = self.weights
        if len(weights) < len(self.group.linears) or not are_alike(weights):
            return None
        return alike_parts(weights)

    @cached_property
    def _adapters(self) -> tuple[Sequence[Any], ...]:
        lora_a, lora_b, scalings = zip(*self.group.joined_adapters(), strict=True)
        return lora_a, lora_b, scalings

    @cached_property
    def num_rows(self) -> list[int]:
        """Outputs of each layer."""
        return [linear.base.out_features for linear in self.group.linears]

    def write(self, out: Tensor) -> None:
        """Write the extended weight to `out` [rows + rank, columns + rank], last stride 1."""
        if self.parts is None:
            self.group.expand_(out)
        else:
            linears: Any = (*self.parts, self.num_rows, self.group.in_features, *self._adapters)
            expand_group_(out, *linears)


class RoomyWeight:
    """An extended weight in its place.

    Attributes:
        forward: [W, sB]^T, [columns + rank, rows].
        down: A, [rank, columns]; None without adapters.
    """

    def __init__(self, data: Tensor, rows: int, columns: int) -> None:
        extended = ExtendedWeight(data, rows, columns)
        self.data = data
        self.rank = len(data) - rows
        self.forward = extended.forward.T
        self.down = extended.down
        self._columns = columns

    def fill_low(self, x: Tensor) -> None:
        """Write x A^T into the columns behind x, of [tokens, columns + rank]."""
        fill_columns(x, self._columns, self.down)

    def product(self, x: Tensor) -> Tensor:
        """x W^T + x A^T (sB)^T, rounded once, of x [tokens, columns] without room."""
        return extend(x, self.down) @ self.forward


class WeightRoom:
    """The memory of one pass.

    Args:
        num_elements: Of the layer that needs most; see `elements`.
        dtype, device: Of the weights.
    """

    def __init__(self, num_elements: int, dtype: torch.dtype, device: torch.device) -> None:
        self._flat = torch.empty(num_elements, dtype=dtype, device=device)
        self._placed: dict[tuple[int, ...], RoomyWeight] = {}

    @staticmethod
    def elements(*side_by_side: Expansion) -> int:
        """Elements that weights need which are there at the same time."""
        return sum(-(-expansion.num_elements // _ALIGNMENT) * _ALIGNMENT for expansion in side_by_side)

    def expand(self, expansion: Expansion, behind: Expansion | None = None) -> RoomyWeight:
        """The weight, written to the beginning of the memory or behind another one, good until the next one there."""
        start = 0 if behind is None else self.elements(behind)
        place = (*expansion.shape, start)
        weight = self._placed.get(place)
        if weight is None:
            rows, columns, rank = expansion.shape
            flat = self._flat[start : start + expansion.num_elements].view(rows + rank, -1)
            weight = self._placed[place] = RoomyWeight(flat[:, : columns + rank], rows, columns)
        expansion.write(weight.data)
        return weight
