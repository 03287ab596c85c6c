"""The fused step on a GPU, with CUDA graphs and without, against Transformers' forward pass."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from transformers.models.auto import CONFIG_MAPPING

from fourfold.inference.decode_graphs import GraphedStep
from fourfold.models.decoding import FusedStep
from fourfold.models.preparing import prepare
from fourfold.quantization.hf_config import FourfoldConfig
from fourfold.quantization.hf_quantizer import quantize_model

pytestmark = pytest.mark.gpu

SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1088,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1000,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "mistral": {"sliding_window": 40},
    "smollm3": {"no_rope_layers": [1, 0, 1], "no_rope_layer_interval": 2},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 3, 40, 70])
def test_graphs_and_kernels_give_transformers_logits(family: str, rows: int) -> None:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**SIZES, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).cuda()
    lora = LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = prepare(quantize_model(model, FourfoldConfig()), lora, fused=True).eval()
    step = FusedStep(adapted)
    assert step._view("default")[0].served
    shapes = [(rows + 1, kv_heads, 256, head_dim) for kv_heads, head_dim, _ in step.layers]
    held = [[torch.zeros(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes] for _ in range(2)]
    cache = SimpleNamespace(keys=held[0], values=held[1], version=0)
    prompts = [torch.randint(3, 1000, (5 + 11 * index % 97,), device="cuda") for index in range(rows)]
    slots = torch.randperm(rows + 1, device="cuda")[:rows]
    for adapter in ("default", None):
        for slot, prompt in zip(slots.tolist(), prompts, strict=True):
            step.prefill(slot, prompt, cache, adapter)
        graphed = GraphedStep(step)
        positions = torch.tensor([len(prompt) for prompt in prompts], device="cuda")
        following = torch.randint(3, 1000, (3, rows), device="cuda")
        ours = [
            graphed.decode(tokens, slots, positions + i, cache, adapter).clone() for i, tokens in enumerate(following)
        ]
        plain = [step.decode(tokens, slots, positions + i, cache, adapter) for i, tokens in enumerate(following)]
        assert all(torch.equal(one, other) for one, other in zip(ours, plain, strict=True))
        for index in range(0, rows, 7):
            with torch.no_grad(), adapted.disable_adapter() if adapter is None else torch.no_grad():
                sequence = torch.cat([prompts[index], following[:, index]])[None]
                whole = adapted(input_ids=sequence, use_cache=False).logits[0, -3:]
            mine = torch.stack([logits[index] for logits in ours])
            assert (mine - whole).float().norm() / whole.float().norm() < 0.03
