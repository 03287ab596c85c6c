"""Whether a model is what was planned for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from peft import PeftModel
from transformers import PreTrainedModel

from fourfold.models.model_shape import ModelShape
from fourfold.models.size import model_size
from fourfold.models.underlying import underlying

__all__ = ["Difference", "shape_differences"]

# Of bytes: scales of a last block that is not full, and the like.
_TOLERANCE = 0.01


class Difference(NamedTuple):
    """A number that is not as planned."""

    part: str
    planned: int
    found: int

    def __str__(self) -> str:
        return f"{self.part}: planned {self.planned:,}, found {self.found:,}"


def shape_differences(shape: ModelShape, model: PreTrainedModel | PeftModel) -> Iterator[Difference]:
    """Each number in which a model with its adapter is another one than `shape` says.

    Args:
        shape: What was planned with.
        model: The model as it is about to be trained: quantized, with its adapter, or all of it.
    """
    base: Any = underlying(model)
    trained = [parameter.numel() for parameter in model.parameters() if parameter.requires_grad]
    size = model_size(model)
    # Without an adapter, what is trained is the base.
    held = size.num_parameters - (sum(trained) if isinstance(model, PeftModel) else 0)
    quantized_bytes = round((size.bits_per_quantized_weight or 0) * size.num_quantized / 8)
    counted = [
        ("weights of the base", shape.num_parameters, held, 0.0),
        ("quantized weights", shape.num_quantized, size.num_quantized, 0.0),
        ("bytes of quantized weights", shape.code_bytes + shape.scale_bytes, quantized_bytes, _TOLERANCE),
        ("adapter matrices", len(shape.adapter_shapes), len(trained), 0.0),
        ("weights of the adapter", shape.num_adapter, sum(trained), 0.0),
    ]
    if shape.blocks:
        counted.insert(0, ("layers", len(shape.blocks), len(base.get_decoder().layers), 0.0))
    for part, planned, found, tolerance in counted:
        if abs(found - planned) > tolerance * planned:
            yield Difference(part, planned, found)
