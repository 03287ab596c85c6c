"""Tiny random models of several families, and answers of Transformers' own generate to compare with."""

from __future__ import annotations

from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

VOCAB = 384  # that of the `tiny_tokenizer` fixture, whose turns end with token 2

_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 2,
    "initializer_range": 0.3,  # answers that differ
}

# Plain ones, one that slides over few tokens, ones of learned positions, of positions by the mask, and of its own mask.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "gemma2": {"sliding_window": 7, "head_dim": 8},
    "mistral": {"sliding_window": 6},
    "gpt2": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {},
    "gpt_neo": {"num_hidden_layers": 4, "attention_types": [[["global", "local"], 2]], "window_size": 6},
}


def small_model(family: str = "llama", seed: int = 0, **config: Any) -> Any:
    """A random model in evaluation mode, fp32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sizes = _SIZES | FAMILIES.get(family, {}) | config
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).eval()
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    return model


def adapted_model(names: tuple[str, ...] = ("default", "other")) -> PeftModel:
    """A small Llama with random adapters of these names, the first one active."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
        model = get_peft_model(small_model(), config, adapter_name=names[0])
        for name in names[1:]:
            model.add_adapter(name, config)
        for key, parameter in model.named_parameters():
            if "lora_B" in key:
                torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def generated(model: Any, prompt: tuple[int, ...], max_new_tokens: int, **options: Any) -> list[int]:
    """What Transformers' generate adds to a prompt alone."""
    input_ids = torch.tensor([prompt])
    output = model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        **({"do_sample": False} | options),
    )
    new: list[int] = output[0, len(prompt) :].tolist()
    return new
