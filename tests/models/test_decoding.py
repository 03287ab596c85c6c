"""The fused step against Transformers' own forward pass with its own cache."""

from __future__ import annotations

import contextlib
import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from decoders import DECODERS, SIZES, VOCAB, adapted, decoder
from peft import LoraConfig, PeftModel
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from transformers import DynamicCache, PreTrainedModel

from fourfold.models import decode_layer
from fourfold.models.decoding import FusedStep
from fourfold.models.linear_group import Unsupported
from fourfold.models.streaming import stream_base
from fourfold.models.underlying import underlying

SLOTS, LENGTH = 4, 32


def empty_cache(step: FusedStep, dtype: torch.dtype = torch.float32) -> Any:
    def held() -> list[Tensor]:
        # What is not written must not be read.
        shapes = [(SLOTS, kv_heads, LENGTH, head_dim) for kv_heads, head_dim, _ in step.layers]
        return [torch.full(shape, 1e4, dtype=dtype) for shape in shapes]

    return SimpleNamespace(keys=held(), values=held())


def by_transformers(model: PreTrainedModel | PeftModel, prompts: list[Tensor], steps: Tensor) -> Tensor:
    """Logits [prompts, 1 + steps, vocab] behind each prompt and behind each of the tokens that follow."""
    rows = []
    # Transformers 5.24 changed its name.
    names = inspect.signature(underlying(model).forward).parameters
    name = "cache" if "cache" in names else "past_key_values"
    with torch.no_grad():
        for prompt, following in zip(prompts, steps.T, strict=True):
            cache: Any = {name: DynamicCache(config=model.config), "use_cache": True}
            logits = [model(input_ids=prompt[None], **cache).logits[0, -1]]
            for token in following:
                out = model(input_ids=token.view(1, 1), **cache)
                logits.append(out.logits[0, -1])
            rows.append(torch.stack(logits))
    return torch.stack(rows)


def by_step(step: FusedStep, prompts: list[Tensor], steps: Tensor, adapter: str | None, split: int = 0) -> Tensor:
    """The same, the prompts in slots 2, 0, 3; with `split`, each in two parts."""
    cache = empty_cache(step)
    slots = torch.tensor([2, 0, 3])
    begun = []
    for slot, prompt in zip(slots.tolist(), prompts, strict=True):
        if split:
            step.prefill(slot, prompt[:split], cache, adapter)
        begun.append(step.prefill(slot, prompt[split:], cache, adapter, start=split))
    logits = [torch.stack(begun)]
    positions = torch.tensor([len(prompt) for prompt in prompts])
    for tokens in steps:
        logits.append(step.decode(tokens, slots, positions, cache, adapter))
        positions = positions + 1
    return torch.stack(logits, dim=1)


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(3))


def prompts() -> list[Tensor]:
    """Of unequal lengths, shorter and longer than the window there is."""
    return [tokens(9), tokens(4), tokens(14)]


def with_two_adapters(model: PreTrainedModel) -> PeftModel:
    """ "default" on all layers, "other" on two, of another rank and scaling."""
    prepared = adapted(model, fused=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        prepared.add_adapter("other", LoraConfig(r=3, lora_alpha=9, target_modules=["q_proj", "down_proj"]))
        for name, parameter in prepared.named_parameters():
            if ".other." in name:
                parameter.data.normal_(std=0.05)
    return prepared


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("quantized", [True, False])
def test_logits_are_those_of_transformers_with_its_cache(name: str, quantized: bool) -> None:
    model = decoder(name, quantized=quantized).eval()
    steps = tokens(4, 3)
    expected = by_transformers(model, prompts(), steps)
    step = FusedStep(model)
    assert step.vocab_size == VOCAB
    torch.testing.assert_close(by_step(step, prompts(), steps, None), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window", "smollm3-no-rope"])
def test_a_prompt_may_come_in_parts(name: str) -> None:
    step, steps = FusedStep(decoder(name).eval()), tokens(2, 3)
    whole = by_step(step, prompts(), steps, None)
    torch.testing.assert_close(by_step(step, prompts(), steps, None, split=3), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2-biases", "qwen3-head-norms"])
@pytest.mark.parametrize("quantized", [True, False])
def test_adapters_are_told_apart_by_name_whichever_is_active(name: str, quantized: bool) -> None:
    model = with_two_adapters(decoder(name, quantized=quantized)).eval()
    step, steps = FusedStep(model), tokens(3, 3)
    assert step.adapters() == ("default", "other")
    expected: dict[str | None, Tensor] = {}
    for adapter in step.adapters():
        model.set_adapter(adapter)
        expected[adapter] = by_transformers(model, prompts(), steps)
    with model.disable_adapter():
        expected[None] = by_transformers(model, prompts(), steps)
    assert not torch.allclose(expected["default"], expected["other"], rtol=1e-2, atol=1e-2)
    for adapter, logits in expected.items():
        torch.testing.assert_close(by_step(step, prompts(), steps, adapter), logits, rtol=1e-4, atol=1e-4)


def test_fused_blocks_are_no_hindrance_and_adapters_that_learned_are_read_anew() -> None:
    model = adapted(decoder("llama-gqa"), fused=True).eval()
    step, steps = FusedStep(model), tokens(2, 3)
    by_step(step, prompts(), steps, "default")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(2)
    step.refresh()
    expected = by_transformers(model, prompts(), steps)
    assert step.version == 1
    torch.testing.assert_close(by_step(step, prompts(), steps, "default"), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama-gqa", "qwen2-biases", "qwen3-head-norms", "mistral-window"])
@pytest.mark.parametrize("by_kernels", [False, True])
def test_a_16_bit_model_is_as_near_as_its_rounding_allows(
    name: str, by_kernels: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The operators of the GPU's way, of which the references run here.
    monkeypatch.setattr(decode_layer, "serves", lambda *_: by_kernels)
    model = with_two_adapters(decoder(name, torch.bfloat16)).eval()
    step, steps = FusedStep(model), tokens(1, 3)
    assert step._view(None)[0].served == by_kernels
    positions = torch.tensor([len(prompt) for prompt in prompts()])
    slots = torch.tensor([1, 0, 2])
    for adapter in ("default", "other"):
        cache = empty_cache(step, torch.bfloat16)
        for slot, prompt in zip(slots.tolist(), prompts(), strict=True):
            step.prefill(slot, prompt, cache, adapter)
        ours = step.decode(steps[0], slots, positions, cache, adapter).float()
        model.set_adapter(adapter)
        expected = by_transformers(model, prompts(), steps)[:, 1].float()
        assert (ours - expected).norm() / expected.norm() < 0.02


def padded(step: FusedStep, prompt: Tensor, slot: int, length: int, cache: Any, adapter: str | None) -> Tensor:
    """Logits after a prompt that is filled up to a length, by tokens that are nowhere in it."""
    input_ids = torch.cat([prompt, torch.full((length - len(prompt),), 2)])
    return step.prefill_padded(input_ids, torch.tensor([slot]), torch.tensor([len(prompt) - 1]), cache, adapter)


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("quantized", [True, False])
@pytest.mark.parametrize("adapter", [None, "other"])
def test_a_prompt_that_is_filled_up_is_read_as_alone_and_so_is_its_answer(
    name: str, quantized: bool, adapter: str | None
) -> None:
    model = with_two_adapters(decoder(name, quantized=quantized)).eval()
    step, steps = FusedStep(model), tokens(4, 3)
    model.set_adapter("other")
    with model.disable_adapter() if adapter is None else contextlib.nullcontext():
        expected = by_transformers(model, prompts(), steps)
    cache, slots = empty_cache(step), torch.tensor([2, 0, 3])
    # To the next token, to none, and to the end of the slot.
    begun = [
        padded(step, prompt, slot, length, cache, adapter)
        for slot, prompt, length in zip(slots.tolist(), prompts(), (10, 4, LENGTH), strict=True)
    ]
    logits, positions = [torch.stack(begun)], torch.tensor([len(prompt) for prompt in prompts()])
    for number, following in enumerate(steps):
        logits.append(step.decode(following, slots, positions + number, cache, adapter))
    torch.testing.assert_close(torch.stack(logits, dim=1), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window"])
@pytest.mark.parametrize("length", [1, 15, 16, LENGTH - 1, LENGTH])
def test_what_fills_a_prompt_up_stays_behind_it_in_its_slot(name: str, length: int) -> None:
    step, prompt = FusedStep(decoder(name).eval()), tokens(length)
    alone, filled = empty_cache(step), empty_cache(step)
    whole = step.prefill(2, prompt, alone, None)
    until = LENGTH if length > 16 else 16
    torch.testing.assert_close(padded(step, prompt, 2, until, filled, None), whole, rtol=1e-4, atol=1e-4)
    for one, other in zip([*alone.keys, *alone.values], [*filled.keys, *filled.values], strict=True):
        torch.testing.assert_close(other[2, :, :length], one[2, :, :length], rtol=1e-4, atol=1e-4)
        assert torch.equal(other[2, :, until:], one[2, :, until:])
        assert torch.equal(other[[0, 1, 3]], one[[0, 1, 3]])


class Recorded(TorchDispatchMode):
    """What is called, over which shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((str(func), tree_map_only(Tensor, lambda value: value.shape, (args, kwargs))))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["qwen2-biases", "mistral-window", "smollm3-no-rope"])
def test_a_filled_prompt_is_one_graph_whatever_its_length_and_slot(name: str) -> None:
    step = FusedStep(with_two_adapters(decoder(name)).eval())
    recorded = []
    for slot, length in ((0, 3), (3, 20)):
        cache = empty_cache(step)
        input_ids, where = tokens(24), (torch.tensor([slot]), torch.tensor([length - 1]))
        step.prefill_padded(input_ids, *where, cache, "default")
        with Recorded() as mode:
            step.prefill_padded(input_ids, *where, cache, "default")
        recorded.append(mode.calls)
    assert recorded[0] == recorded[1]
    # None of them reads back what a tensor holds.
    assert not [call for call, _ in recorded[0] if "_local_scalar_dense" in call or "nonzero" in call]


def unsupported() -> dict[str, Any]:
    return {
        "no fused block": lambda: decoder("gemma", head_dim=SIZES["head_dim"]),
        "the base streams": lambda: streamed(),
        "the rotary embedding changes": lambda: decoder(
            "llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
        ),
        "hook": lambda: hooked(),
    }


def streamed() -> PeftModel:
    model = adapted(decoder("llama-gqa"), fused=False)
    stream_base(model, torch.device("cpu"))
    return model


def hooked() -> PreTrainedModel:
    model = decoder("llama-gqa")
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.parametrize("reason", list(unsupported()))
def test_what_it_cannot_do_it_refuses_with_the_reason(reason: str) -> None:
    with pytest.raises(Unsupported, match=reason):
        FusedStep(unsupported()[reason]())


def test_an_adapter_it_cannot_do_it_names_and_serves_the_others() -> None:
    model = adapted(decoder("llama-gqa"), fused=False)
    model.add_adapter("dora", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    step = FusedStep(model.eval())
    assert step.supports(None) is None
    assert step.supports("default") is None
    assert "Dora" in str(step.supports("dora"))
    assert "no adapter" in str(step.supports("missing"))


def test_an_adapter_that_is_merged_is_refused() -> None:
    model = adapted(decoder("llama-gqa"), fused=False)
    model.merge_adapter()
    with pytest.raises(Unsupported, match="merged"):
        FusedStep(model)
