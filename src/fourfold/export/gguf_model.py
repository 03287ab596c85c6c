"""A model in GGUF's keys and tensors, as llama.cpp reads it.

A family is a row of `GGUF_FAMILIES`, a way to store weights one of `QUANTIZATIONS`. Keys and tensor names come from the
gguf library; how llama.cpp wants q and k, and the frequencies of Llama 3, was read from its converter.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, LlamaFileType
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fourfold.errors import ConfigError
from fourfold.export.gguf_tokenizer import require_exportable, write_tokenizer
from fourfold.export.merged_weights import MergedTensor, merged_tensors
from fourfold.models.underlying import underlying

__all__ = ["GGUF_FAMILIES", "QUANTIZATIONS", "GgufFamily", "require_family", "write_gguf"]


@dataclass(frozen=True)
class GgufFamily:
    """How llama.cpp has a family.

    Args:
        architecture: Its architecture.
        interleaves: The rows of each head of q and k stand in pairs that are rotated together; Transformers has them
            half a head apart.
        frequency_factors: It reads factors of the rotary frequencies (Llama 3's scaling).
        fixed: Settings of Transformers' configuration that the architecture has no key for, as it takes them to be.
    """

    architecture: gguf.MODEL_ARCH
    interleaves: bool = False
    frequency_factors: bool = False
    fixed: tuple[tuple[str, Any], ...] = (("hidden_act", "silu"),)


# Keyed by Transformers' `config.model_type`.
GGUF_FAMILIES: dict[str, GgufFamily] = {
    "llama": GgufFamily(gguf.MODEL_ARCH.LLAMA, interleaves=True, frequency_factors=True),
    "mistral": GgufFamily(gguf.MODEL_ARCH.LLAMA, interleaves=True),
    "qwen2": GgufFamily(gguf.MODEL_ARCH.QWEN2),
    "qwen3": GgufFamily(gguf.MODEL_ARCH.QWEN3),
    "smollm3": GgufFamily(
        gguf.MODEL_ARCH.SMOLLM3, interleaves=True, fixed=(("hidden_act", "silu"), ("no_rope_layer_interval", 4))
    ),
}

# What the gguf library quantizes: the type of the layers' weights, that of embedding and head, and the file's.
QUANTIZATIONS: dict[str, tuple[GGMLQuantizationType, GGMLQuantizationType, LlamaFileType]] = {
    "F32": (GGMLQuantizationType.F32, GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "F16": (GGMLQuantizationType.F16, GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "BF16": (GGMLQuantizationType.BF16, GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "Q8_0": (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "Q5_1": (GGMLQuantizationType.Q5_1, GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q5_1),
    "Q5_0": (GGMLQuantizationType.Q5_0, GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q5_0),
    "Q4_1": (GGMLQuantizationType.Q4_1, GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q4_1),
    "Q4_0": (GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q4_0),
}

_LARGE = ("token_embd.weight", "output.weight")


def require_family(config: Any) -> GgufFamily:
    """The row of a model's family.

    Raises:
        ConfigError: A family, or a setting of it, that is not known here to read the same in llama.cpp.
    """
    family = GGUF_FAMILIES.get(config.model_type)
    if family is None:
        raise ConfigError(
            "models of this family cannot be written to GGUF",
            found=config.model_type,
            allowed=GGUF_FAMILIES,
            hint="export to safetensors, and convert with llama.cpp's own converter",
        )
    for key, value in family.fixed:
        if getattr(config, key, value) != value:
            raise ConfigError(
                f"llama.cpp's {gguf.MODEL_ARCH_NAMES[family.architecture]} has no such setting",
                found=f"{key}: {getattr(config, key)}",
                allowed=f"{key}: {value}",
            )
    rope = config.rope_parameters["rope_type"]
    known = ("default", "linear", *(("llama3",) if family.frequency_factors else ()))
    if rope not in known:
        raise ConfigError("a scaling of the positions that is not written to GGUF here", found=rope, allowed=known)
    return family


def write_gguf(
    model: PeftModel | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: Path,
    quantization: str,
    stops: Sequence[int],
    name: str,
) -> None:
    """Write a model with its adapter merged in; one weight at a time is in memory.

    Args:
        model: Base and adapter, or a model without one; it stays as it is.
        tokenizer: Its tokenizer, which goes into the file with its chat template.
        path: The file.
        quantization: A key of `QUANTIZATIONS`. Vectors stay in fp32, rows that are not whole blocks in fp16.
        stops: Tokens that end a reply.
        name: The model's name.

    Raises:
        ConfigError: A family, a setting or a tokenizer that is not written here.
    """
    base = underlying(model)
    family = require_family(base.config)
    num_rows = base.get_input_embeddings().weight.shape[0]
    require_exportable(tokenizer, num_rows)
    tensors = _named(merged_tensors(model), family, base.config.num_hidden_layers)
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[family.architecture])
    try:
        writer.add_name(name)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(QUANTIZATIONS[quantization][2])
        _write_settings(writer, base.config, num_rows)
        write_tokenizer(writer, tokenizer, num_rows, stops)
        factors = _frequency_factors(base)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
        types = {target: _type_of(target, tensor.shape, quantization) for target, tensor in tensors.items()}
        for target, tensor in tensors.items():
            _announce(writer, target, tensor.shape, types[target])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for target, tensor in tensors.items():
            values = tensor.read().float().numpy()
            if family.interleaves and re.search(r"\.attn_[qk]\.", target):
                heads = base.config.num_key_value_heads if ".attn_k." in target else base.config.num_attention_heads
                values = _interleaved(values, heads)
            writer.write_tensor_data(gguf.quants.quantize(values, types[target]))
    finally:
        writer.close()


def _named(tensors: list[MergedTensor], family: GgufFamily, num_layers: int) -> dict[str, MergedTensor]:
    names = gguf.get_tensor_name_map(family.architecture, num_layers)
    named = {names.get_name(tensor.name, try_suffixes=(".weight", ".bias")): tensor for tensor in tensors}
    if None in named:
        raise ConfigError("GGUF has no name for a weight of this model", found=named[None].name)
    return named


def _write_settings(writer: gguf.GGUFWriter, config: Any, num_rows: int) -> None:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    window = getattr(config, "sliding_window", None)
    if not getattr(config, "use_sliding_window", True):
        window = None
    # These architectures attend to all that came before: up to the window's length that is the same model.
    writer.add_context_length(min(config.max_position_embeddings, window or config.max_position_embeddings))
    writer.add_vocab_size(num_rows)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])


def _frequency_factors(base: PreTrainedModel) -> np.ndarray[Any, np.dtype[np.float32]] | None:
    """By what llama.cpp divides each rotary frequency: those of the model's own module against unscaled ones."""
    rope = base.config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    scaled = base.get_decoder().rotary_emb.inv_freq.detach().double().cpu()
    plain = rope["rope_theta"] ** -(torch.arange(len(scaled), dtype=torch.float64) / len(scaled))
    factors: np.ndarray[Any, np.dtype[np.float32]] = (plain / scaled).float().numpy()
    return factors


def _type_of(name: str, shape: tuple[int, ...], quantization: str) -> GGMLQuantizationType:
    layers, large, _ = QUANTIZATIONS[quantization]
    if len(shape) == 1:
        return GGMLQuantizationType.F32
    wanted = large if name in _LARGE else layers
    block_size, _ = gguf.GGML_QUANT_SIZES[wanted]
    return wanted if shape[-1] % block_size == 0 else GGMLQuantizationType.F16


def _announce(writer: gguf.GGUFWriter, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType) -> None:
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    num_bytes = int(np.prod(shape)) // block_size * block_bytes
    writer.add_tensor_info(name, shape, np.dtype(np.float32), num_bytes, raw_dtype=kind)


def _interleaved(values: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Rows of each head from halves to pairs: [heads, 2, half, ...] becomes [heads, half, 2, ...]."""
    halves = values.reshape(num_heads, 2, -1, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)
