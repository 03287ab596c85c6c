"""What the loss holds beside the layers: the output head, frozen or trained, and chunks of its logits.

`fourfold.training.loss` computes it. A frozen head's chunk of logits becomes its own gradient; a trained head is called
under autograd, which keeps logits in fp32, and its gradient is summed up over the chunks.
"""

from __future__ import annotations

from collections.abc import Iterator

from fourfold.kernels.cross_entropy import AUTOGRAD_LOGITS, rows_at_once
from fourfold.models.block_memory import Tensors
from fourfold.models.model_shape import ModelShape

__all__ = ["evaluation_chunk", "loss_moments"]

_FP32 = 4


def loss_moments(shape: ModelShape, tokens: int) -> Iterator[tuple[int, Tensors]]:
    """Bytes of logits, and what else is worked on, at each moment that may be the highest."""
    return _trained_head(shape, tokens) if shape.head_gradient_bytes else _frozen_head(shape, tokens)


def evaluation_chunk(shape: ModelShape, tokens: int) -> int:
    """Bytes of a chunk of logits without a gradient."""
    if shape.head_gradient_bytes:
        # In the head's dtype, in fp32, and as log-probabilities.
        return _autograd_rows(shape, tokens) * shape.vocab_size * (shape.element_size + 2 * _FP32)
    return _chunk_of_logits(shape, tokens)[1]


def _chunk_of_logits(shape: ModelShape, tokens: int) -> tuple[int, int]:
    """Rows of it, and bytes."""
    rows = min(rows_at_once(shape.vocab_size, shape.hidden_size, shape.element_size), tokens)
    return rows, rows * (-(-shape.vocab_size // 64) * 64) * shape.element_size


def _frozen_head(shape: ModelShape, tokens: int) -> Iterator[tuple[int, Tensors]]:
    hidden = tokens * shape.hidden_size * shape.element_size
    rows, logits = _chunk_of_logits(shape, tokens)
    working: Tensors = {
        "normed output": hidden,
        "gradient of it": hidden,
        "a chunk of it, and its gradient": 2 * rows * shape.hidden_size * shape.element_size,
    }
    if shape.head_is_quantized:
        working["head, dequantized"] = shape.vocab_size * shape.hidden_size * shape.element_size
    yield logits, working


def _autograd_rows(shape: ModelShape, tokens: int) -> int:
    return min(tokens, max(1, AUTOGRAD_LOGITS // shape.vocab_size))


def _trained_head(shape: ModelShape, tokens: int) -> Iterator[tuple[int, Tensors]]:
    element, head = shape.element_size, shape.head_gradient_bytes
    hidden = tokens * shape.hidden_size * element
    rows = _autograd_rows(shape, tokens)
    logits, chunk = rows * shape.vocab_size, rows * shape.hidden_size * element
    sums: Tensors = {"gradient of the normed output": hidden, "gradient of the head": head}
    chunks: Tensors = {"normed output": hidden, "supervised rows of it": hidden, **sums}
    # Logits, log-probabilities and the gradients of both, beside the chunk before's gradient of the head.
    yield 4 * _FP32 * logits, {**chunks, "gradients of the chunk before": head + chunk}
    # Logits and their gradient in the head's dtype, while this chunk's gradient of the head is made.
    cast = element if element != _FP32 else 0
    yield (2 * _FP32 + cast) * logits, {**chunks, "gradients of two chunks": 2 * (head + chunk)}
    # The backward pass scales both sums into new memory.
    yield 0, {**sums, "both, scaled": hidden + head}
