"""The fused step on a GPU, with CUDA graphs and without, against Transformers' forward pass."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM
from transformers.models.auto import CONFIG_MAPPING

from fourfold.inference.cache import CacheShape, LayerShape, SlotCache
from fourfold.inference.decode_graphs import MOST_PROMPT_TOKENS, GraphedStep
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


def fused_step(family: str, **sizes: Any) -> tuple[Any, FusedStep]:
    """A model with a random adapter over weights of 4 bits, and the step that its kernels serve."""
    torch.manual_seed(0)
    config = CONFIG_MAPPING[family](**SIZES | FAMILIES[family] | sizes)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).cuda()
    lora = LoraConfig(r=8, lora_alpha=16, task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = prepare(quantize_model(model, FourfoldConfig()), lora, fused=True).eval()
    step = FusedStep(adapted)
    assert step._view("default")[0].served
    return adapted, step


def slot_cache(step: FusedStep, num_slots: int, max_length: int, first: int) -> SlotCache:
    layers = tuple(LayerShape(kv_heads, head_dim, head_dim, window) for kv_heads, head_dim, window in step.layers)
    return SlotCache(CacheShape(layers, step.dtype), num_slots, max_length, "cuda", first_bucket=first)


def prompt(length: int) -> torch.Tensor:
    return torch.randint(3, 1000, (length,), device="cuda")


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("adapter", [None, "default"])
def test_replayed_prompts_give_the_logits_of_the_pass_and_disturb_no_other_slot(
    family: str, adapter: str | None
) -> None:
    adapted, step = fused_step(family)
    graphed, cache, plain = GraphedStep(step), slot_cache(step, 3, 300, 300), slot_cache(step, 3, 300, 300)
    # Lengths in turn: at edges, between them, to the end of the slot, and shorter than what stood there.
    lengths = [100, 200, 128, 250, 65, 193, 300, 290, 1, 60, 256, 110]
    for number, length in enumerate(lengths):
        slot, input_ids = (1, 2, 1)[number % 3], prompt(length)
        before = [held.clone() for held in (*cache.keys, *cache.values) if held is not None]
        found = graphed.prefill(slot, input_ids, cache, adapter)
        assert distance(found, step.prefill(slot, input_ids, plain, adapter)) < 0.03
        with torch.no_grad(), adapted.disable_adapter() if adapter is None else torch.no_grad():
            whole = adapted(input_ids=input_ids[None], use_cache=False).logits[0, -1]
        assert distance(found, whole) < 0.03
        others = [index for index in range(3) if index != slot]
        for one, other, old in zip([*cache.keys, *cache.values], [*plain.keys, *plain.values], before, strict=True):
            assert one is not None
            assert other is not None
            assert distance(one[slot, :, :length], other[slot, :, :length]) < 0.03
            assert torch.equal(one[others], old[others])
        if length < 300:
            # What answers find in the slot is the prompt, whatever stands behind it.
            tokens, places = prompt(1), torch.tensor([slot, length], device="cuda")
            ours = graphed.decode(tokens, places[:1], places[1:], cache, adapter)
            assert distance(ours, step.decode(tokens, places[:1], places[1:], plain, adapter)) < 0.03
    assert sorted(length for length, _ in graphed._prompts) == [64, 128, 256, 300]
    assert graphed.captures_prompts


def test_prompts_are_captured_anew_when_the_cache_has_grown_or_adapters_have_changed() -> None:
    adapted, step = fused_step("llama")
    graphed, cache, plain = GraphedStep(step), slot_cache(step, 2, 600, 128), slot_cache(step, 2, 600, 600)

    def check(length: int, start: int = 0) -> None:
        input_ids = prompt(length)
        cache.ensure(start + length)
        for adapter in (None, "default"):
            for slot in (0, 1):
                found = graphed.prefill(slot, input_ids, cache, adapter, start)
                assert distance(found, step.prefill(slot, input_ids, plain, adapter, start)) < 0.03

    check(100)
    check(100)
    check(90, start=100)
    held = {key: graph.logits for key, graph in graphed._prompts.items()}
    check(100)
    assert held.keys() == graphed._prompts.keys()
    assert all(graph.logits is not held[key] for key, graph in graphed._prompts.items())
    check(500)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(0.5)
    step.refresh()
    check(100)
    check(500)


def test_graphs_of_prompts_keep_what_they_say_whatever_their_order() -> None:
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 32, "num_key_value_heads": 8}
    _, step = fused_step("llama", **sizes)
    graphed, cache = GraphedStep(step), slot_cache(step, 1, 2048, 2048)
    says = step.prompt_bytes(MOST_PROMPT_TOKENS)
    longest = prompt(2048)
    step.prefill(0, longest, cache, "default")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step.prefill(0, longest, cache, "default")
    assert torch.cuda.max_memory_allocated() - before < 1.1 * says + 4 * 2**20
    pools = {segment["segment_pool_id"] for segment in torch.cuda.memory_snapshot()}
    for length in (100, 700, 1000, 300, 1900, 64, 2048, 1500):
        for adapter in (None, "default"):
            for _ in range(2):
                graphed.prefill(0, longest[:length], cache, adapter)
    assert len(graphed._prompts) == 16
    kept = sum(
        segment["total_size"]
        for segment in torch.cuda.memory_snapshot()
        if segment["segment_pool_id"] not in pools and segment["segment_pool_id"] != (0, 0)
    )
    # Beside it small tensors, in segments of 2 MiB and 20 MiB.
    assert 0 < kept < 1.1 * says + 48 * 2**20


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 3, 40, 70])
def test_graphs_and_kernels_give_transformers_logits(family: str, rows: int) -> None:
    adapted, step = fused_step(family)
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
