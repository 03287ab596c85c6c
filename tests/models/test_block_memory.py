"""What a block's formulas say against the tensors that its forward pass leaves."""

from __future__ import annotations

import pytest
import torch
from decoders import adapted, decoder
from torch import Tensor

from fourfold.models.block_forward import block_forward
from fourfold.models.block_memory import BlockMemory
from fourfold.models.model_shape import model_shape
from fourfold.models.recomputation import POLICIES
from fourfold.quantization.hf_config import FourfoldConfig

TOKENS = (3, 14)


def held(tensor: Tensor) -> int:
    return tensor.untyped_storage().nbytes()


@pytest.mark.parametrize("name", ["llama-gqa", "llama-odd", "qwen3-head-norms"])
@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_kept_is_what_the_forward_pass_saves(name: str, policy: str) -> None:
    rank = 5
    model = adapted(decoder(name, torch.bfloat16), fused=True, r=rank, target_modules="all-linear")
    base = model.get_base_model().model
    ids = torch.zeros(TOKENS, dtype=torch.int64)
    x = base.embed_tokens(ids)
    angles = base.rotary_emb(x, torch.arange(TOKENS[1])[None])
    block = base.layers[0]._block(x, position_embeddings=angles)
    flat = x.detach().reshape(-1, x.shape[-1])
    _, saved = block_forward(flat, block, POLICIES[policy].keeps)
    shape = model_shape(model.get_base_model().config, FourfoldConfig(), rank, "all-linear")
    kept = BlockMemory(shape.blocks[0], len(flat), policy).kept()
    found = {name: value for name, value in vars(saved).items() if isinstance(value, Tensor)}
    found["gate_up"] = found.pop("gate_up_x", None)
    for key, size in kept.items():
        if key != "lse":  # the CPU's attention keeps none
            assert held(found.pop(key)) == size, key
    assert not [key for key, value in found.items() if value is not None]


def test_moments_hold_all_that_is_kept_until_it_is_used() -> None:
    shape = model_shape(decoder("llama-gqa").config, FourfoldConfig(), 4).blocks[0]
    for policy in POLICIES:
        memory = BlockMemory(shape, 4096, policy)
        kept = memory.kept()
        assert kept.items() <= memory.backward_moments()[0].items(), policy
        assert set(kept) - {"low_gate_up", "gate_up", "mid", "x", "low_down", "low_out", "rstd2"} <= set(
            memory.forward_moments()[2]
        ), policy


def test_only_policies_that_offload_wait_in_host_memory() -> None:
    shape = model_shape(decoder("llama-gqa").config, FourfoldConfig(), 4).blocks[0]
    for name, policy in POLICIES.items():
        memory = BlockMemory(shape, 100, name)
        assert bool(memory.host_bytes()) == policy.offload
        # Whole pages, and no tensor's beginning is off by more than 256 bytes.
        offloaded = memory.offloaded()
        assert 0 <= memory.host_bytes() - sum(offloaded.values()) < 4096 + 256 * len(offloaded)
