from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from fourfold.errors import ConfigError
from fourfold.export import llama_cpp
from fourfold.export.gguf_model import write_gguf
from fourfold.export.targets import export_model
from fourfold.export.trained import Trained

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
CASES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "llama, tied": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama, Llama 3's positions": (LlamaConfig, LlamaForCausalLM, {"rope_parameters": LLAMA3}),
    "llama, linear positions": (
        LlamaConfig,
        LlamaForCausalLM,
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 128}),
    "smollm3": (SmolLM3Config, SmolLM3ForCausalLM, {"num_hidden_layers": 4}),
}


def tiny(name: str, tokenizer: Any) -> PreTrainedModel:
    config_class, model_class, keys = CASES[name]
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        # Two rows more than there are tokens.
        "vocab_size": len(tokenizer) + 2,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config_class(**(sizes | keys)))
        for parameter in model.parameters():
            # Larger than at initialisation, biases too, so that a fault in any weight shows.
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def trained(model: PreTrainedModel, tokenizer: Any) -> Trained:
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(3, 300, (48,), generator=generator).tolist() for _ in range(4)]
    stops = [tokenizer.eos_token_id]
    return Trained(model, tokenizer, prompts, stops, torch.bfloat16, "tiny", "base", None)


@pytest.mark.parametrize("name", CASES)
def test_each_family_answers_the_same_in_transformers_and_in_llama_cpp(
    name, tiny_tokenizer, tmp_path, one_quiet_thread
) -> None:
    model = tiny(name, tiny_tokenizer)
    readers = {"transformers"} if name != "smollm3" else set()
    if llama_cpp.is_installed():
        readers.add("llama.cpp")
    if not readers:
        pytest.skip("xllamacpp is not installed")
    report = export_model(trained(model, tiny_tokenizer), tmp_path / "out", "gguf", "F32", 1e-5, 0.98)
    assert set(report.readings) == readers
    assert report.readings[next(iter(readers))].agreement.num_tokens > 0
    rope = json.loads((tmp_path / "out" / "verification.json").read_text())["readers"]
    if "positions" in name:
        assert rope["transformers"]["checks"]["rope"] == "the trained model's: not read from the file"


def test_weights_are_stored_as_the_gguf_library_rounds_them(tiny_tokenizer, tmp_path) -> None:
    model = tiny("qwen2", tiny_tokenizer)
    write_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", "Q4_0", [2], "tiny")
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().numpy()
    expected = gguf.quants.quantize(weight, gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(tensors["blk.0.attn_q.weight"].data, expected)
    kinds = {name: tensor.tensor_type.name for name, tensor in tensors.items()}
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q8_0"
    assert kinds["blk.0.attn_q.bias"] == kinds["output_norm.weight"] == "F32"


def test_rows_that_are_not_whole_blocks_stay_in_16_bits(tiny_tokenizer, tmp_path) -> None:
    config = tiny("llama", tiny_tokenizer).config
    config.intermediate_size = 72
    write_gguf(LlamaForCausalLM(config), tiny_tokenizer, tmp_path / "m.gguf", "Q8_0", [2], "tiny")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert kinds["blk.0.ffn_down.weight"] == "F16"
    assert kinds["blk.0.ffn_up.weight"] == "Q8_0"


def test_a_sliding_window_bounds_the_context_within_which_the_model_is_the_same(tiny_tokenizer, tmp_path) -> None:
    config = tiny("mistral", tiny_tokenizer).config
    config.sliding_window = 64
    write_gguf(MistralForCausalLM(config), tiny_tokenizer, tmp_path / "m.gguf", "F16", [2], "tiny")
    assert gguf.GGUFReader(tmp_path / "m.gguf").fields["llama.context_length"].contents() == 64


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hidden_act", "gelu", r"hidden_act: gelu"),
        ("rope_parameters", {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, "dynamic"),
    ],
)
def test_settings_that_llama_cpp_does_not_have_are_refused_by_name(
    key, value, said, tiny_tokenizer, tmp_path: Path
) -> None:
    model = tiny("llama", tiny_tokenizer)
    setattr(model.config, key, value)
    with pytest.raises(ConfigError, match=said):
        write_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", "F16", [2], "tiny")


def test_a_family_that_is_not_known_is_refused_by_name(tiny_tokenizer, tmp_path) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=len(tiny_tokenizer)))
    with pytest.raises(ConfigError, match=r"gpt2(.|\n)*llama, mistral, qwen2, qwen3, smollm3"):
        write_gguf(model, tiny_tokenizer, tmp_path / "m.gguf", "F16", [2], "tiny")
    assert not (tmp_path / "m.gguf").exists()
