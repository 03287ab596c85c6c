"""What is known of model families. A family is a row; every other causal LM takes the generic path."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["FAMILIES", "Family", "default_target_modules"]

_GATED_DECODER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Family:
    """A family of decoders.

    Args:
        target_modules: The linear layers that get an adapter when the user names none: all of the block's, which the
            QLoRA paper (section 4) found necessary to match full fine-tuning.
        fused_layer: Transformers' decoder layer that has a fused block, by its full name; None where there is none.
    """

    target_modules: tuple[str, ...]
    fused_layer: str | None = None


def _layer(model_type: str, prefix: str) -> str:
    return f"transformers.models.{model_type}.modeling_{model_type}.{prefix}DecoderLayer"


# Keyed by Transformers' `config.model_type`.
FAMILIES: dict[str, Family] = {
    "llama": Family(_GATED_DECODER, _layer("llama", "Llama")),
    "mistral": Family(_GATED_DECODER, _layer("mistral", "Mistral")),
    "qwen2": Family(_GATED_DECODER, _layer("qwen2", "Qwen2")),
    "qwen3": Family(_GATED_DECODER, _layer("qwen3", "Qwen3")),
    "smollm3": Family(_GATED_DECODER, _layer("smollm3", "SmolLM3")),
    "gemma": Family(_GATED_DECODER),
    "gemma2": Family(_GATED_DECODER),
    "gemma3_text": Family(_GATED_DECODER),
    "olmo2": Family(_GATED_DECODER),
    "phi3": Family(("qkv_proj", "o_proj", "gate_up_proj", "down_proj")),
    "gpt2": Family(("c_attn", "c_proj", "c_fc")),
}


def default_target_modules(model_type: str) -> list[str] | str:
    """Targets when none are given: the family's, or every linear layer of a family that is not in the table."""
    family = FAMILIES.get(model_type)
    return list(family.target_modules) if family else "all-linear"
