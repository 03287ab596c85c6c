"""What passes between the GPUs of a run in a step, by kind; how much of each is in `parallel`."""

from __future__ import annotations

import math
from collections.abc import Sequence

from fourfold.memory.parallel import Parallelism
from fourfold.models.model_shape import ModelShape
from fourfold.models.recomputation import POLICIES

__all__ = ["between_stages", "end_bytes", "end_reductions", "layer_reductions", "traffic"]


def traffic(
    shape: ModelShape, parallelism: Parallelism, batch: int, seq: int, policies: Sequence[str], accumulation: int
) -> dict[str, int]:
    """Bytes that a GPU receives, and sends, in a step, by kind; of a pipeline, that with the most.

    Args:
        shape: The model; where tensors are divided, one GPU's part of it.
        parallelism: How GPUs share the run.
        batch, seq: Rows of a GPU's microbatch, and their tokens.
        policies: Recomputation policy of each layer.
        accumulation: Microbatches of a step.
    """
    if parallelism.num_gpus == 1:
        return {}
    gradients, shards = shape.gradient_bytes, parallelism.shards
    if shards.divides == "layers":
        kinds = {"activations between stages": accumulation * between_stages(shape, parallelism, batch * seq)}
        if shape.is_tied:
            # The first stage's gradient of the embedding and the last stage's of the head are summed on both.
            kinds["gradients reduced"] = shape.embedding_gradient_bytes
    elif shards.divides == "tensors":
        tokens = batch * seq
        layers = sum(layer_reductions(shape, parallelism, tokens, policy) for policy in policies)
        logits, ends = end_reductions(shape, parallelism, tokens)
        kinds = {
            "activations reduced": accumulation * (layers + ends),
            "logits gathered": accumulation * logits,
            "gradients reduced": 2 * parallelism.passed(_partial_gradients(shape)),
        }
    else:
        weights = 2 * (sum(shape.shardable_bytes) + sum(shape.adapters_of_layers)) + end_bytes(shape)
        kinds = {
            "weights gathered": accumulation * parallelism.gathered_bytes(weights),
            "gradients scattered": accumulation * parallelism.scattered_bytes(gradients, shape.trained_element),
            "gradients reduced": parallelism.reduced_bytes(gradients),
            "updated weights gathered": parallelism.renewed_bytes(gradients),
        }
    return {kind: size for kind, size in kinds.items() if size}


def end_bytes(shape: ModelShape) -> int:
    """Of embedding and head, gathered in a microbatch: each once, and an embedding that is trained once more."""
    quantized = shape.code_bytes + shape.scale_bytes - sum(shape.shardable_bytes) if shape.layer_codes else 0
    return sum(shape.dense_ends) + quantized + shape.embedding_gradient_bytes


def layer_reductions(shape: ModelShape, parallelism: Parallelism, tokens: int, policy: str) -> int:
    """Of a layer whose tensors are divided: its activations are summed behind the attention and behind the MLP, their
    gradients before both; what stands behind the attention once more where it is computed again."""
    again = 0 if "mid" in POLICIES[policy].keeps else 1
    return (4 + again) * 2 * parallelism.passed(_hidden(shape, tokens))


def end_reductions(shape: ModelShape, parallelism: Parallelism, tokens: int) -> tuple[int, int]:
    """Of embedding and head that are divided by the vocabulary: logits, gathered; and what the embedding gives, and the
    gradient of what the head takes, summed. Where they are quantized they are whole."""
    embedding, head = shape.dense_ends
    has_head = head > 0 or (shape.is_tied and embedding > 0)
    logits = tokens * shape.vocab_size * shape.element_size
    summed = (bool(embedding) + has_head) * 2 * parallelism.passed(_hidden(shape, tokens))
    return parallelism.passed(logits) if has_head else 0, summed


def between_stages(shape: ModelShape, parallelism: Parallelism, tokens: int) -> int:
    """What a stage receives for a microbatch: the activation of the one before, and its gradient of the one behind;
    where there are but two stages, each receives one of these."""
    return (1 if parallelism.num_gpus == 2 else 2) * _hidden(shape, tokens)


def _hidden(shape: ModelShape, tokens: int) -> int:
    return tokens * shape.hidden_size * shape.element_size


def _partial_gradients(shape: ModelShape) -> int:
    """Bytes of gradients of which each GPU has a term only: of those factors of adapters that are not divided, which
    are as wide as the residual stream."""
    if not shape.adapter_bytes:
        return 0
    return 4 * sum(math.prod(one) for one in shape.adapter_shapes if len(one) == 2 and shape.hidden_size in one)
