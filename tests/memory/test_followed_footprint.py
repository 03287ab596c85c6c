"""Peaks of layers on the generic path and of full fine-tuning, against what PyTorch's allocator gave real steps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig
from real_steps import LIBRARY_BYTES, foretold, measured_peak
from transformers import Gemma3TextConfig, GPT2Config, LlamaConfig, Qwen3Config

from fourfold.kernels import cross_entropy
from fourfold.memory.footprint import Step, footprint
from fourfold.memory.head import loss_moments
from fourfold.models.followed_layer import followed_shape
from fourfold.models.following import follow
from fourfold.quantization.hf_config import FourfoldConfig
from fourfold.training import loss as loss_module
from fourfold.training.loss import supervised_cross_entropy

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "vocab_size": 96,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES = {
    "llama": LlamaConfig(**SIZES),
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "gemma3": Gemma3TextConfig(**SIZES, sliding_window=512),
    "gpt2": GPT2Config(
        n_embd=64, n_layer=6, n_head=4, vocab_size=96, n_positions=512, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    ),
}
# name -> quantized, what the adapter has; None: no adapter
METHODS: dict[str, tuple[bool, dict[str, Any] | None]] = {
    "full": (False, None),
    "lora": (False, {}),
    "qlora": (True, {}),
    "dora": (True, {"use_dora": True}),
    "head-too": (False, {"modules_to_save": ["lm_head"]}),
}
# What is rare is looked at in one family.
CASES = [(family, method) for family in FAMILIES for method in METHODS if family == "llama" or "lora" in method]
CASES += [(family, "full") for family in FAMILIES if family != "llama"]


def adapter(options: dict[str, Any] | None) -> LoraConfig | None:
    return None if options is None else LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", **options)


@pytest.mark.parametrize("checkpoints", [False, True], ids=["none", "checkpoints"])
@pytest.mark.parametrize(("family", "method"), CASES)
def test_peaks_are_foretold_as_they_were_allocated(family: str, method: str, checkpoints: bool) -> None:
    quantized, options = METHODS[method]
    accumulation = 2 if family == "qwen3" else 1
    setting: Any = (FAMILIES[family], quantized, adapter(options), checkpoints, accumulation)
    peak = foretold(*setting).peak_bytes - LIBRARY_BYTES
    # GPT-2's peaks are met less well, by up to 3%; the cause is not known.
    bound = 0.03 if family == "gpt2" else 0.015
    assert abs(peak / measured_peak(*setting) - 1) < bound


def test_a_large_vocabulary_makes_the_loss_the_peak_and_is_met(monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(**{**SIZES, "vocab_size": 4000, "num_hidden_layers": 2})
    for module in (loss_module, cross_entropy):
        monkeypatch.setattr(module, "AUTOGRAD_LOGITS", 200 * 4000)
    monkeypatch.setattr("fourfold.memory.head.AUTOGRAD_LOGITS", 200 * 4000)
    setting: Any = (config, False, None, True, 1)
    held = foretold(*setting)
    assert held.moment == "loss"
    assert abs((held.peak_bytes - LIBRARY_BYTES) / measured_peak(*setting) - 1) < 0.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", [40, 1000], ids=["large-head", "large-chunks"])
def test_a_trained_heads_loss_holds_what_its_formula_says(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, rows: int
) -> None:
    vocab, hidden, tokens = 5000, 512, 4096
    monkeypatch.setattr(loss_module, "AUTOGRAD_LOGITS", rows * vocab)
    monkeypatch.setattr("fourfold.memory.head.AUTOGRAD_LOGITS", rows * vocab)
    config = LlamaConfig(**{**SIZES, "vocab_size": vocab, "hidden_size": hidden})
    shape = followed_shape(config, None, None, dtype)
    with torch.device("meta"):
        head = torch.nn.Linear(hidden, vocab, bias=False, dtype=dtype)
        like = torch.empty(1, tokens, hidden, dtype=dtype)
        labels = torch.zeros(1, tokens, dtype=torch.int64)
        positions = torch.arange(tokens - 1)

    held: list[torch.Tensor] = []

    def run(normed: torch.Tensor) -> torch.Tensor:
        # As the trainer holds it.
        held.append(normed)
        return supervised_cross_entropy(normed, labels, head, positions).loss_sum

    found = follow(head, run, like).forward.peak
    wanted = max(logits + sum(working.values()) for logits, working in loss_moments(shape, tokens))
    assert abs(wanted / sum(found.values()) - 1) < 0.03


def test_weights_gradients_and_adapters_are_those_of_the_method() -> None:
    config = LlamaConfig(**SIZES)
    full = followed_shape(config, None, None, torch.bfloat16)
    assert full.gradient_bytes == full.dense_bytes == 2 * full.num_parameters
    assert full.adapter_bytes == 0
    qlora = followed_shape(config, FourfoldConfig(), adapter({}), torch.bfloat16)
    assert qlora.num_parameters == full.num_parameters
    assert qlora.gradient_bytes == qlora.adapter_bytes == 4 * qlora.num_adapter
    both = followed_shape(config, None, adapter({"modules_to_save": ["lm_head"]}), torch.bfloat16)
    assert both.head_gradient_bytes > 0
    assert both.adapter_bytes == qlora.adapter_bytes + both.head_gradient_bytes


def test_gradients_of_microbatches_before_are_there_from_the_first_layer_on() -> None:
    shape = followed_shape(LlamaConfig(**SIZES), None, None, torch.bfloat16)
    one, two = (footprint(shape, Step(4, 128, ["none"] * 6, accumulation=count)) for count in (1, 2))
    for moment in ("forward", "loss"):
        assert two.moments[moment] - one.moments[moment] == shape.gradient_bytes
    assert two.moments["update"] == one.moments["update"]


def test_a_large_update_can_be_the_peak() -> None:
    shape = followed_shape(LlamaConfig(**SIZES), None, None, torch.bfloat16)
    held = footprint(shape, Step(1, 16, ["full"] * 6, update_bytes=2**30))
    assert held.moment == "update"
    assert held.detail == {"workspace of the optimizer": 2**30}
