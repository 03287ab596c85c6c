"""What a model is made of, from its configuration alone: no weight is read, and none takes memory."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from fourfold.errors import ConfigError
from fourfold.models.block_memory import BlockShape, Tensors
from fourfold.models.families import FAMILIES, default_target_modules
from fourfold.models.following import Followed
from fourfold.models.linear_group import padded_rank
from fourfold.models.recomputation import POLICIES
from fourfold.models.streaming import layer_bytes
from fourfold.quantization.footprint import code_bytes, scale_bytes, scale_parts
from fourfold.quantization.hf_config import FourfoldConfig
from fourfold.quantization.selection import matches
from fourfold.quantization.swapping import dense_linears, skip_patterns

__all__ = ["Ends", "LayerMemory", "LayerShape", "ModelShape", "is_target", "model_shape"]

_FP32 = 4


class LayerMemory(Protocol):
    """A layer's tensors for a microbatch under one policy; see `block_memory.BlockMemory`."""

    def kept(self) -> Tensors: ...
    def offloaded(self) -> Tensors: ...
    def host_bytes(self) -> int: ...
    def forward_moments(self) -> list[Tensors]: ...
    def backward_moments(self) -> list[Tensors]: ...
    def __hash__(self) -> int: ...


class LayerShape(Protocol):
    """A decoder layer: a fused block (`block_memory.BlockShape`), or one that is followed (`followed_layer`)."""

    @property
    def gradient_bytes(self) -> int:
        """Of what it trains."""

    @property
    def weight_bytes(self) -> int:
        """Of its weights in linear layers, were none of them quantized."""

    def memory(self, batch: int, seq: int, policy: str) -> LayerMemory:
        """What it holds for `batch` rows of `seq` tokens."""


class Ends(Protocol):
    """What of a model is before and behind its layers; see `followed_layer.FollowedEnds`."""

    def around(self, batch: int, seq: int) -> int: ...
    def tail(self, batch: int, seq: int) -> Followed: ...


@dataclass(frozen=True)
class ModelShape:
    """Numbers of a model, its quantization and its adapter.

    Args:
        num_parameters: Weights of the base, a shared one counted once.
        num_quantized: Those that are quantized.
        code_bytes, scale_bytes: What these take.
        dense_bytes: What the others take.
        adapter_shapes: Of every A and B, or whatever else is trained.
        adapter_bytes: What is trained beside the base takes; 0 where the base itself is.
        gradient_bytes: Of all that is trained.
        blocks: The decoder layers, first to last.
        layer_bytes: Quantized weights of each decoder layer as they stream, see `models.streaming`; empty where they
            cannot.
        layer_codes: Of these, bytes of the codes.
        vocab_size, hidden_size: Of the output head; a vocabulary of 0 where there is none, as on the first stages of a
            pipeline.
        head_is_quantized: Whether it is dequantized for the loss.
        is_fused: Whether `blocks` are fused blocks.
        element_size: Bytes of a number of the activations.
        head_gradient_bytes: Of the output head and what else is trained behind the layers.
        embedding_gradient_bytes: Of the input embedding.
        is_tied: Whether these two are one.
        vocab_parts: Among how many GPUs their rows are divided.
        ends: What is before and behind layers that are followed; None for fused blocks.
    """

    num_parameters: int
    num_quantized: int
    code_bytes: int
    scale_bytes: int
    dense_bytes: int
    adapter_shapes: tuple[tuple[int, ...], ...]
    adapter_bytes: int
    gradient_bytes: int
    blocks: tuple[LayerShape, ...]
    layer_bytes: tuple[int, ...]
    layer_codes: tuple[int, ...]
    vocab_size: int
    hidden_size: int
    head_is_quantized: bool
    is_fused: bool
    element_size: int = 2
    head_gradient_bytes: int = 0
    embedding_gradient_bytes: int = 0
    is_tied: bool = False
    vocab_parts: int = 1
    ends: Ends | None = None

    @property
    def policies(self) -> tuple[str, ...]:
        """Those that layers can have."""
        return tuple(POLICIES) if self.is_fused else ("none", "full")

    @property
    def num_dense(self) -> int:
        """Weights that stay as they are."""
        return self.num_parameters - self.num_quantized

    @cached_property
    def weights_of_layers(self) -> tuple[int, ...]:
        """Bytes of each decoder layer's linear weights: quantized, as they stream, or as they are."""
        if self.layer_bytes:
            return self.layer_bytes
        return tuple(block.weight_bytes for block in self.blocks)

    @property
    def has_head(self) -> bool:
        return self.vocab_size > 0

    @cached_property
    def shardable_bytes(self) -> tuple[int, ...]:
        """Bytes of each decoder layer's linear weights: codes with their scales, all of which are in one format, or as
        they are."""
        if not self.layer_codes:
            return tuple(block.weight_bytes for block in self.blocks)
        return tuple(size + size * self.scale_bytes // self.code_bytes for size in self.layer_codes)

    @cached_property
    def adapters_of_layers(self) -> tuple[int, ...]:
        """Bytes of what is trained beside the base in each decoder layer."""
        return tuple(block.gradient_bytes if self.adapter_bytes else 0 for block in self.blocks)

    @cached_property
    def dense_ends(self) -> tuple[int, int]:
        """Bytes of the embedding and of the head where they are not quantized; of a matrix that both are, once."""
        matrix = -(-self.vocab_size // self.vocab_parts) * self.hidden_size * self.element_size
        dense = self.dense_bytes - (0 if self.layer_codes else sum(self.shardable_bytes))
        head = 0 if self.head_is_quantized else matrix
        if self.is_tied:
            return head, 0
        return matrix if dense >= matrix + head else 0, head

    @property
    def trained_element(self) -> int:
        """Bytes of a number that is trained."""
        return _FP32 if self.adapter_bytes else self.element_size

    @cached_property
    def num_adapter(self) -> int:
        """Trained weights."""
        return sum(math.prod(shape) for shape in self.adapter_shapes)


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

    Raises:
        ConfigError: LLM.int8(), whose layers take the generic path.
    """
    if quantization is not None and quantization.load_in_8bit:
        raise ConfigError("LLM.int8() has no fused blocks", hint="followed_shape gives the shape of its model")
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    skipped = ["*"] if quantization is None else skip_patterns(model, quantization, False)
    targets = default_target_modules(config.model_type) if target_modules is None else target_modules
    head = model.get_output_embeddings()
    linears = dict(dense_linears(model))
    quantized = [linear for name, linear in linears.items() if not matches(name, skipped)]
    adapted = {name: linear for name, linear in linears.items() if linear is not head and is_target(name, targets)}
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
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    adapter_bytes = _FP32 * sum(rows * columns for rows, columns in shapes)
    return ModelShape(
        num_parameters=num_parameters,
        num_quantized=sum(sizes),
        code_bytes=codes,
        scale_bytes=scales,
        dense_bytes=(num_parameters - sum(sizes)) * element_size,
        adapter_shapes=shapes,
        adapter_bytes=adapter_bytes,
        gradient_bytes=adapter_bytes,
        layer_bytes=tuple(layer_bytes(_sizes(layer, quantized, quantization)) for layer in layers) if quantized else (),
        layer_codes=tuple(sum(_sizes(layer, quantized, quantization, of_scales=False)) for layer in layers)
        if quantized
        else (),
        blocks=tuple(_block(layer, set(map(id, adapted.values())), rank, element_size) for layer in layers),
        vocab_size=head.weight.shape[0],
        hidden_size=head.weight.shape[1],
        head_is_quantized=any(linear is head for linear in quantized),
        is_fused=is_fused,
        element_size=element_size,
        is_tied=embedding.weight is head.weight,
    )


def is_target(name: str, targets: Sequence[str] | str) -> bool:
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


def _sizes(
    layer: nn.Module, quantized: Sequence[nn.Module], quantization: FourfoldConfig | None, *, of_scales: bool = True
) -> list[int]:
    """Bytes of each tensor of a layer's quantized linears."""
    assert quantization is not None
    known = set(map(id, quantized))
    sizes: list[int] = []
    for module in layer.modules():
        if id(module) in known:
            count = module.weight.numel()  # type: ignore[operator]
            sizes.append(code_bytes(count, quantization.bnb_4bit_quant_type))
            if of_scales:
                sizes += scale_parts(count, quantization.bnb_4bit_blocksize, quantization.bnb_4bit_use_double_quant)
    return sizes
