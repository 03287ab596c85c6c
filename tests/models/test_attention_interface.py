"""``attn_implementation="fourfold"`` against ``"sdpa"``: the same models, the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from fourfold.errors import TrainingError
from fourfold.models.attention import Documents
from fourfold.models.attention_interface import (
    document_mask,
    documents_from_mask,
    documents_from_position_ids,
    register_attention,
    window_from_mask,
    window_mask,
)

SHAPE = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {},
    "Mistral": {"sliding_window": 5},
    "Gemma3Text": {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]},
}
LENGTHS = [7, 4, 9]
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]


def make_model(family: str, attention: str, **changes: Any) -> Any:
    register_attention()
    config = getattr(transformers, f"{family}Config")(**(SHAPE | FAMILIES[family] | changes))
    config._attn_implementation = attention
    torch.manual_seed(0)
    name = family.replace("Text", "")
    return getattr(transformers, f"{name}ForCausalLM")(config).train()


def results(model: Any, keep: Tensor | None = None, **inputs: Any) -> list[Tensor]:
    """Logits of the tokens kept, and the gradients of all weights by a loss over them."""
    logits = model(use_cache=False, **inputs).logits
    logits = logits if keep is None else logits[keep.bool()]
    logits.float().log_softmax(-1)[..., 3].sum().backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    return [logits.detach(), *gradients]


def assert_same(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert len(actual) == len(expected)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def ids(batch: int, length: int) -> Tensor:
    return torch.randint(3, 64, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", FAMILIES)
def test_plain_rows_give_sdpas_logits_and_gradients(family: str) -> None:
    inputs = {"input_ids": ids(2, 20), "attention_mask": torch.ones(2, 20, dtype=torch.long)}
    assert_same(results(make_model(family, "fourfold"), **inputs), results(make_model(family, "sdpa"), **inputs))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["right", "left"])
def test_padded_rows_give_sdpas_logits_and_gradients_at_the_tokens(family: str, side: str) -> None:
    mask = (torch.arange(20) < torch.tensor([[20], [13]])).long()
    mask = mask if side == "right" else mask.flip(1)
    inputs = {"input_ids": ids(2, 20), "attention_mask": mask, "keep": mask}
    assert_same(results(make_model(family, "fourfold"), **inputs), results(make_model(family, "sdpa"), **inputs))


def by_position_ids() -> dict[str, Any]:
    return {}


def by_arguments() -> dict[str, Any]:
    bounds = torch.tensor([0, 7, 11, 20], dtype=torch.int32)
    return {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 9, "max_length_k": 9}


def by_mask() -> dict[str, Any]:
    return {"attention_mask": document_mask(documents_from_position_ids(POSITIONS))}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("declare", [by_position_ids, by_arguments, by_mask])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_give_sdpas_logits_and_gradients(
    family: str, declare: Callable[[], dict[str, Any]], checkpointing: bool
) -> None:
    inputs = {"input_ids": ids(1, 20), "position_ids": POSITIONS}
    ours = make_model(family, "fourfold")
    if checkpointing:
        ours.gradient_checkpointing_enable()
    assert_same(results(ours, **inputs, **declare()), results(make_model(family, "sdpa"), **inputs))


def test_packed_rows_give_what_separate_documents_give() -> None:
    model, tokens = make_model("Mistral", "fourfold"), ids(1, 20)
    packed = model(tokens, position_ids=POSITIONS, use_cache=False, **by_mask()).logits
    alone = [model(part, use_cache=False).logits for part in tokens.split(LENGTHS, dim=1)]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_with_a_cache_gives_sdpas_tokens(family: str, cache: str) -> None:
    mask = (torch.arange(9) >= torch.tensor([[0], [4]])).long()
    options = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    if cache == "static":
        options["disable_compile"] = True
    ours, theirs = (make_model(family, name).eval().generate(ids(2, 9), **options) for name in ("fourfold", "sdpa"))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("declare", [by_position_ids, by_arguments, by_mask])
def test_attention_dropout_and_packing_go_together(declare: Callable[[], dict[str, Any]]) -> None:
    inputs = {"input_ids": ids(1, 20), "position_ids": POSITIONS, "use_cache": False}
    ours, theirs = (make_model("Llama", name, attention_dropout=0.5) for name in ("fourfold", "sdpa"))
    torch.manual_seed(0)
    actual = ours(**inputs, **declare()).logits
    torch.manual_seed(0)
    torch.testing.assert_close(actual, theirs(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_autocast_casts_for_our_attention_as_for_sdpa() -> None:
    inputs = {"input_ids": ids(2, 20)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = (make_model("Qwen3", name)(**inputs, use_cache=False).logits for name in ("fourfold", "sdpa"))
    torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


def test_masks_that_speak_take_no_memory_and_say_what_they_were_made_from() -> None:
    documents = Documents(torch.tensor([0, 7, 20], dtype=torch.int32), 13)
    mask = document_mask(documents)
    assert mask.data_ptr() == documents.cu_seqlens.data_ptr()
    told = documents_from_mask(mask)
    assert told is not None
    assert torch.equal(told.cu_seqlens, documents.cu_seqlens)
    assert told.max_length == 13
    assert window_from_mask(mask) is None
    assert window_from_mask(window_mask(5)) == 5
    assert documents_from_mask(window_mask(5)) is None
    assert documents_from_mask(torch.ones(1, 1, 4, 4, dtype=torch.bool)) is None


def test_positions_that_start_again_begin_a_document_and_rows_end_one() -> None:
    documents = documents_from_position_ids(torch.tensor([[0, 1, 2, 0, 0], [0, 1, 0, 1, 2]]))
    assert documents.cu_seqlens.tolist() == [0, 3, 4, 5, 7, 10]
    assert documents.cu_seqlens.dtype == torch.int32
    assert documents.max_length == 3


def test_declared_documents_refuse_a_cache_that_they_would_not_fit() -> None:
    model = make_model("Llama", "fourfold").eval()
    cache = model(ids(1, 4)).past_key_values
    with pytest.raises(TrainingError, match="use_cache=False"):
        model(ids(1, 20), position_ids=POSITIONS, past_key_values=cache, **by_mask())


def test_registering_twice_is_no_harm() -> None:
    assert register_attention() == register_attention() == "fourfold"
