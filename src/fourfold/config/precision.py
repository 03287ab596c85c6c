"""Keys of the base's precision that are each valid and do not fit together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fourfold.config.run import RunConfig

__all__ = ["precision_contradictions"]

# Those of a `Contradiction`: keys, what, hint.
Fields = tuple[tuple[str, ...], str, str]


def precision_contradictions(config: RunConfig) -> Iterator[Fields]:
    """The fields of a `Contradiction`: how the base is quantized, LLM.int8(), quantizing again during training."""
    yield from _quantized_contradictions(config)
    eight: dict[str, bool] = {
        "load_in_4bit": config.load_in_4bit,
        "bnb_4bit_quant_type": config.bnb_4bit_quant_type != "nf4",
        "quantize_embeddings": config.quantize_embeddings,
        "calibration": config.calibration != "absmax",
    }
    for key, is_set in eight.items():
        if config.load_in_8bit and is_set:
            yield (
                (key, "load_in_8bit"),
                f"{key} is given, and load_in_8bit is LLM.int8(), which has its own format",
                "give one of them; blocks of int8 are load_in_4bit: true with bnb_4bit_quant_type: int8",
            )
    if config.llm_int8_threshold != 6.0 and not config.load_in_8bit:
        yield (
            ("llm_int8_threshold", "load_in_8bit"),
            "llm_int8_threshold is given, and load_in_8bit is false",
            "set load_in_8bit: true or leave llm_int8_threshold out",
        )
    again: dict[str, tuple[bool, str]] = {
        "adapter": (config.adapter is None, "there is no adapter to merge"),
        "load_in_4bit": (not config.quantizes, "the base is not quantized"),
        "use_dora": (config.use_dora, "DoRA's magnitudes belong to the base as it was"),
        "stream_base": (config.stream_base is not None, "the base streams, and cannot change"),
    }
    for key, (is_set, reason) in again.items():
        if config.requantize_every is not None and is_set:
            yield (("requantize_every", key), f"requantize_every is given, and {reason}", "leave one of them out")


def _quantized_contradictions(config: RunConfig) -> Iterator[Fields]:
    if not config.quantizes:
        for key, is_set in {
            "bnb_4bit_quant_type": config.bnb_4bit_quant_type != "nf4",
            "quantize_lm_head": config.quantize_lm_head,
            "init_lora_weights": config.init_lora_weights == "loftq",
            "stream_base": config.stream_base is not None,
        }.items():
            if is_set:
                yield (
                    (key, "load_in_4bit"),
                    f"{key} asks for a quantized base model, and load_in_4bit is false",
                    f"set load_in_4bit: true or leave {key} out",
                )
    if config.stream_base is not None and config.cuda_graphs:
        yield (
            ("stream_base", "cuda_graphs"),
            "cuda_graphs is true, and the weights of a base that streams have no place of their own",
            "leave cuda_graphs out",
        )
    for key in ("modules_to_not_convert", "modules_to_save"):
        if config.quantize_lm_head and "lm_head" in getattr(config, key):
            yield (
                ("quantize_lm_head", key),
                f"quantize_lm_head is true, and {key} lists lm_head",
                "choose one",
            )
