"""``attn_implementation="fourfold"`` on the GPU against ``"sdpa"`` in fp32 and against itself in bf16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import MistralConfig, MistralForCausalLM

from fourfold.models.attention_interface import document_mask, documents_from_position_ids, register_attention

pytestmark = pytest.mark.gpu

LENGTHS = [70, 1, 121]
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]


def make_model(attention: str, dtype: torch.dtype) -> Any:
    register_attention()
    torch.manual_seed(0)
    config = MistralConfig(
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        vocab_size=64,
        sliding_window=50,
    )
    config._attn_implementation = attention
    return MistralForCausalLM(config).to("cuda", dtype).train()


def results(model: Any, calls: list[dict[str, Tensor]], keep: Tensor) -> list[Tensor]:
    """Logits of the tokens kept, of all calls one after the other, and the gradients by a loss over them."""
    logits = torch.cat([model(use_cache=False, **inputs).logits.flatten(0, 1) for inputs in calls])[keep]
    logits.float().log_softmax(-1)[..., 3].mean().backward()
    return [logits.detach(), *(p.grad for p in model.parameters())]


# Our calls and which of their tokens count, then the same for sdpa.
Case = tuple[list[dict[str, Tensor]], Tensor, list[dict[str, Tensor]], Tensor]


def packed() -> Case:
    positions = POSITIONS.cuda()
    tokens = torch.randint(64, positions.shape, generator=torch.Generator().manual_seed(1)).cuda()
    inputs = {"input_ids": tokens, "position_ids": positions}
    declared = inputs | {"attention_mask": document_mask(documents_from_position_ids(positions))}
    keep = torch.ones_like(positions, dtype=torch.bool).flatten()
    return [declared], keep, [inputs], keep


def padded() -> Case:
    """sdpa gets the rows one by one: where padding is wider than the window, it has queries that see no token, and its
    bf16 kernels fill them, and what comes after, with NaN."""
    tokens = torch.randint(64, (2, 192), generator=torch.Generator().manual_seed(1)).cuda()
    mask = (torch.arange(192) < torch.tensor([[192], [101]])).cuda()
    apart = [{"input_ids": row[kept][None]} for row, kept in zip(tokens, mask, strict=True)]
    whole = torch.ones(192 + 101, dtype=torch.bool, device="cuda")
    return [{"input_ids": tokens, "attention_mask": mask.long()}], mask.flatten(), apart, whole


@pytest.mark.parametrize("make_case", [packed, padded])
def test_fp32_gives_sdpas_logits_and_gradients(make_case: Any) -> None:
    ours, kept, theirs, all_kept = make_case()
    actual = results(make_model("fourfold", torch.float32), ours, kept)
    expected = results(make_model("sdpa", torch.float32), theirs, all_kept)
    for one, other in zip(actual, expected, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-4


@pytest.mark.parametrize("make_case", [packed, padded])
def test_bf16_is_no_further_from_fp32_than_sdpa_is(make_case: Any) -> None:
    ours, kept, theirs, all_kept = make_case()
    exact = results(make_model("sdpa", torch.float32), theirs, all_kept)
    actual = results(make_model("fourfold", torch.bfloat16), ours, kept)
    generic = results(make_model("sdpa", torch.bfloat16), theirs, all_kept)
    for one, other, reference in zip(actual, generic, exact, strict=True):
        error, bound = (float((x.float() - reference).norm() / reference.norm()) for x in (one, other))
        assert error < 1.3 * bound + 1e-3
