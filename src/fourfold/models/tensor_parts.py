"""What one GPU has of a model whose layers' tensors are divided among several, as Transformers' plan divides them.

Its `base_model_tp_plan` names linear layers that are divided by their outputs ("colwise") and by their inputs
("rowwise"): then each GPU has some of the attention's heads and of the MLP's columns, and a smaller model has the
shapes of its part. Embedding and head are divided by the vocabulary, unless they are quantized.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

from fourfold.errors import ConfigError
from fourfold.models.model_shape import ModelShape

__all__ = ["divided_config", "with_divided_ends"]

_STYLES = {"colwise", "rowwise", "replicated_with_grad_allreduce"}
_WIDTHS = ("num_attention_heads", "num_key_value_heads", "intermediate_size")


def divided_config(config: Any, degree: int) -> Any:
    """The configuration of a model whose layers are one GPU's part.

    Args:
        config: Transformers' configuration.
        degree: Among how many GPUs they are divided.

    Raises:
        ConfigError: A family that Transformers has no such plan of, or one that gathers between products; heads or
            columns that cannot be divided among so many.
    """
    plan = config.base_model_tp_plan or {}
    styles = set(plan.values())
    if not plan or not styles <= _STYLES or any(not hasattr(config, name) for name in _WIDTHS):
        raise ConfigError(
            "there is no forecast of tensor parallel for this family",
            found=f"{config.model_type}: {', '.join(sorted(styles - _STYLES)) or 'no base_model_tp_plan'}",
            allowed="families whose layers Transformers divides colwise and rowwise",
        )
    widths = {name: getattr(config, name) or config.num_attention_heads for name in _WIDTHS}
    if any(width % degree for width in widths.values()):
        common = math.gcd(*widths.values())
        degrees = [number for number in range(2, common + 1) if common % number == 0]
        raise ConfigError(
            "heads or columns cannot be divided among so many GPUs",
            found=f"{degree} GPUs, {', '.join(f'{name}: {width}' for name, width in widths.items())}",
            allowed=f"{', '.join(map(str, degrees))} GPUs" if degrees else "one GPU",
        )
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    divided = copy.deepcopy(config)
    for name, width in widths.items():
        setattr(divided, name, width // degree)
    divided.head_dim = head_dim
    return divided


def with_divided_ends(shape: ModelShape, degree: int) -> ModelShape:
    """The part's shape, with as much of embedding and head as one GPU has."""
    rows = -(-shape.vocab_size // degree)
    matrix = (shape.vocab_size, shape.hidden_size)
    gone = sum(size - size * rows // shape.vocab_size for size in shape.dense_ends)
    shapes = tuple((rows, shape.hidden_size) if one == matrix else one for one in shape.adapter_shapes)
    trained = sum(map(math.prod, shapes)) * shape.trained_element
    ends = shape.embedding_gradient_bytes, shape.head_gradient_bytes
    embedding, head = (size * rows // shape.vocab_size for size in ends)
    return replace(
        shape,
        dense_bytes=shape.dense_bytes - gone,
        adapter_shapes=shapes,
        adapter_bytes=trained if shape.adapter_bytes else 0,
        gradient_bytes=trained,
        head_gradient_bytes=head,
        embedding_gradient_bytes=embedding,
        vocab_parts=degree,
    )
