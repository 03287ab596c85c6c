"""What a model is made of, from its configuration alone: no weight is read, and none takes memory."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from fourfold.models.block_memory import BlockShape
from fourfold.models.families import FAMILIES, default_target_modules
from fourfold.models.linear_group import padded_rank
from fourfold.models.streaming import layer_bytes
from fourfold.quantization.footprint import code_bytes, scale_bytes, scale_parts
from fourfold.quantization.hf_config import FourfoldConfig
from fourfold.quantization.selection import matches
from fourfold.quantization.swapping import dense_linears, skip_patterns

__all__ = ["ModelShape", "model_shape"]


@dataclass(frozen=True)
class ModelShape:
    """Numbers of a model, its quantization and its adapter.

    Args:
        num_parameters: Weights of the base, a shared one counted once.
        num_quantized: Those that are quantized.
        code_bytes, scale_bytes: What these take.
        adapter_shapes: Of every A and B, as they are trained.
        blocks: The decoder layers, first to last.
        layer_bytes: Quantized weights of each decoder layer as they stream, see `models.streaming`; empty where they
            cannot.
        vocab_size, hidden_size: Of the output head.
        head_is_quantized: Whether it is dequantized for the loss.
        is_fused: Whether the family has a fused block, which alone `blocks` describe.
    """

    num_parameters: int
    num_quantized: int
    code_bytes: int
    scale_bytes: int
    adapter_shapes: tuple[tuple[int, int], ...]
    blocks: tuple[BlockShape, ...]
    layer_bytes: tuple[int, ...]
    vocab_size: int
    hidden_size: int
    head_is_quantized: bool
    is_fused: bool

    @property
    def num_dense(self) -> int:
        """Weights that stay as they are."""
        return self.num_parameters - self.num_quantized

    @cached_property
    def weights_of_layers(self) -> tuple[int, ...]:
        """Bytes of each decoder layer's linear weights: quantized, as they stream, or as they are."""
        if self.layer_bytes:
            return self.layer_bytes
        return tuple(sum(block.products.values()) * block.element_size for block in self.blocks)

    @cached_property
    def num_adapter(self) -> int:
        """Trained weights."""
        return sum(rows * columns for rows, columns in self.adapter_shapes)


def model_shape(
    config: Any,
    quantization: FourfoldConfig | None,
    rank: int,
    target_modules: Sequence[str] | str | None = None,
    element_size: int = 2,
) -> ModelShape:
    """The shape of a causal LM.

    Args:
        config: Transformers' configuration.
        quantization: How it is quantized; None: not at all.
        rank: Of the adapter on each target.
        target_modules: As PEFT takes them; None: the family's.
        element_size: Bytes of a number of the activations.
    """
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    skipped = ["*"] if quantization is None else skip_patterns(model, quantization, False)
    targets = default_target_modules(config.model_type) if target_modules is None else target_modules
    head = model.get_output_embeddings()
    linears = dict(dense_linears(model))
    quantized = [linear for name, linear in linears.items() if not matches(name, skipped)]
    adapted = {name: linear for name, linear in linears.items() if linear is not head and _is_target(name, targets)}
    sizes = [linear.weight.numel() for linear in quantized]
    embedding = model.get_input_embeddings()
    if quantization is not None and quantization.quantize_embeddings and embedding.weight is not head.weight:
        sizes.append(embedding.weight.numel())
    codes = scales = 0
    if quantization is not None:
        block = (quantization.bnb_4bit_blocksize, quantization.bnb_4bit_use_double_quant)
        codes = sum(code_bytes(size, quantization.bnb_4bit_quant_type) for size in sizes)
        scales = sum(scale_bytes(size, *block) for size in sizes)
    shapes = tuple(
        shape
        for linear in adapted.values()
        for shape in ((rank, linear.weight.shape[1]), (linear.weight.shape[0], rank))
    )
    family = FAMILIES.get(config.model_type)
    is_fused = family is not None and family.fused_layer is not None
    layers = _layers(model) if is_fused else []
    return ModelShape(
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        num_quantized=sum(sizes),
        code_bytes=codes,
        scale_bytes=scales,
        adapter_shapes=shapes,
        layer_bytes=tuple(_layer_bytes(layer, quantized, quantization) for layer in layers) if quantized else (),
        blocks=tuple(_block(layer, set(map(id, adapted.values())), rank, element_size) for layer in layers),
        vocab_size=head.weight.shape[0],
        hidden_size=head.weight.shape[1],
        head_is_quantized=any(linear is head for linear in quantized),
        is_fused=is_fused,
    )


def _is_target(name: str, targets: Sequence[str] | str) -> bool:
    """PEFT's rule: a regular expression for the whole name, or names of modules; "all-linear" but for the head."""
    if targets == "all-linear":
        return True
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _layers(model: nn.Module) -> list[Any]:
    return list(model.get_decoder().layers)  # type: ignore[operator]


def _block(layer: Any, adapted: set[int], rank: int, element_size: int) -> BlockShape:
    attention, mlp = layer.self_attn, layer.mlp
    groups = {
        "qkv_rank": [attention.q_proj, attention.k_proj, attention.v_proj],
        "out_rank": [attention.o_proj],
        "gate_up_rank": [mlp.gate_proj, mlp.up_proj],
        "down_rank": [mlp.down_proj],
    }
    counts = {name: sum(id(linear) in adapted for linear in linears) for name, linears in groups.items()}
    every = [linear for linears in groups.values() for linear in linears if id(linear) in adapted]
    return BlockShape(
        hidden=mlp.gate_proj.in_features,
        intermediate=mlp.gate_proj.out_features,
        num_heads=attention.q_proj.out_features // attention.head_dim,
        num_kv_heads=attention.k_proj.out_features // attention.head_dim,
        head_dim=attention.head_dim,
        has_head_norms=hasattr(attention, "q_norm"),
        adapter_parameters=sum(rank * (linear.in_features + linear.out_features) for linear in every),
        element_size=element_size,
        **{name: padded_rank(count * rank) for name, count in counts.items()},
    )


def _layer_bytes(layer: nn.Module, quantized: Sequence[nn.Module], quantization: FourfoldConfig | None) -> int:
    assert quantization is not None
    known = set(map(id, quantized))
    sizes: list[int] = []
    for module in layer.modules():
        if id(module) in known:
            count = module.weight.numel()  # type: ignore[operator]
            sizes.append(code_bytes(count, quantization.bnb_4bit_quant_type))
            sizes += scale_parts(count, quantization.bnb_4bit_blocksize, quantization.bnb_4bit_use_double_quant)
    return layer_bytes(sizes)
