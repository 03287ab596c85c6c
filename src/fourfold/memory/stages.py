"""A model in parts, as a pipeline's GPUs have them.

Layers are split as Transformers splits them (`transformers.distributed.pipeline_parallel`): in equal runs, of what
remains one more to each of the first. The embedding is on the first stage, the last norm and the head on the last, and
there the embedding, too, where the head shares it.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from fourfold.errors import ConfigError
from fourfold.models.model_shape import ModelShape

__all__ = ["first_layers", "in_flight", "stages"]


def first_layers(num_layers: int, num_stages: int) -> list[int]:
    """The first layer of each stage, and behind it the number of all.

    Raises:
        ConfigError: More stages than layers.
    """
    if num_stages > num_layers:
        raise ConfigError(
            "a pipeline has no more stages than layers",
            found=f"{num_stages} GPUs, {num_layers} layers",
            allowed=f"2 to {num_layers} GPUs",
        )
    each, more = divmod(num_layers, num_stages)
    return [stage * each + min(stage, more) for stage in range(num_stages + 1)]


def in_flight(stage: int, num_stages: int, microbatches: int) -> int:
    """Microbatches whose activations a stage has at a time, where a forward pass and a backward pass alternate (1F1B):
    the first stage's first comes back when all behind it have one."""
    return min(microbatches, num_stages - stage)


def stages(shape: ModelShape, num_stages: int) -> list[ModelShape]:
    """The model of each stage; of one, the model. Raises as `first_layers`."""
    if num_stages == 1:
        return [shape]
    bounds = list(pairwise(first_layers(len(shape.blocks), num_stages)))
    linears = shape.layer_codes or shape.shardable_bytes
    in_codes = bool(shape.layer_codes)
    # Beside the layers' linears: embedding and head, and norms, alike in all layers.
    embedding, head = shape.dense_ends
    norms = shape.dense_bytes - embedding - head - (0 if in_codes else sum(linears))
    if shape.is_tied:
        head = embedding
    num_quantized = (not embedding) + (not head)
    codes = shape.code_bytes - sum(shape.layer_codes)
    layers_scales = shape.scale_bytes * sum(shape.layer_codes) // max(1, shape.code_bytes)

    def stage(index: int, first: int, last: int) -> ModelShape:
        is_first, is_last = index == 0, index == num_stages - 1
        share = (last - first) / len(shape.blocks)
        of_codes = (is_first * (not embedding) + is_last * (not head)) / (1 if shape.is_tied else max(1, num_quantized))
        layers = sum(linears[first:last])
        gradients = sum(block.gradient_bytes for block in shape.blocks[first:last])
        gradients += is_first * shape.embedding_gradient_bytes + is_last * shape.head_gradient_bytes
        return replace(
            shape,
            num_parameters=int(shape.num_parameters * share),
            num_quantized=int(shape.num_quantized * share),
            code_bytes=(layers if in_codes else 0) + int(codes * of_codes),
            scale_bytes=int(layers_scales * share + (shape.scale_bytes - layers_scales) * of_codes),
            dense_bytes=(0 if in_codes else layers) + is_first * embedding + is_last * head + int(norms * share),
            adapter_shapes=((gradients // shape.trained_element,),),
            adapter_bytes=gradients if shape.adapter_bytes else 0,
            gradient_bytes=gradients,
            blocks=shape.blocks[first:last],
            layer_bytes=shape.layer_bytes[first:last],
            layer_codes=shape.layer_codes[first:last],
            vocab_size=shape.vocab_size if is_last else 0,
            head_gradient_bytes=shape.head_gradient_bytes if is_last else 0,
            embedding_gradient_bytes=shape.embedding_gradient_bytes if is_first else 0,
        )

    return [stage(index, *bound) for index, bound in enumerate(bounds)]
