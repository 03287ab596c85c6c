"""What every model family, recomputation policy, attention kernel and optimizer keeps, over every row of the tables."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import tiny
import torch
from decoders import DECODERS, SIZES, adapted, decoder, distance, loss_and_grads
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.models.auto import CONFIG_MAPPING

from fourfold.models.attention import (
    ATTENTION,
    AttentionCase,
    Documents,
    attention_backward,
    attention_forward,
    choose_attention,
)
from fourfold.models.attention_math import causal_mask
from fourfold.models.block import FusedDecoderLayer, set_recomputation
from fourfold.models.families import FAMILIES, default_target_modules
from fourfold.models.recomputation import POLICIES
from fourfold.training.checkpoint import checkpoint_path
from fourfold.training.options import OPTIMIZERS

FUSED = [name for name, family in FAMILIES.items() if family.fused_layer]


def fused_layers(model: nn.Module) -> list[FusedDecoderLayer]:
    return [module for module in model.modules() if isinstance(module, FusedDecoderLayer)]


# ---- Families ----


@pytest.mark.parametrize("name", FAMILIES)
def test_a_familys_targets_are_all_linear_layers_of_its_blocks(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**SIZES))
    kinds = {key.rpartition(".")[2] for key, module in model.named_modules() if type(module).__name__ == "Linear"}
    kinds |= {key.rpartition(".")[2] for key, module in model.named_modules() if type(module).__name__ == "Conv1D"}
    assert set(default_target_modules(name)) == kinds - {"lm_head"}


@pytest.mark.parametrize("name", FUSED)
def test_a_familys_fused_layers_have_the_loss_and_gradients_of_its_own(name: str) -> None:
    fused, generic = (adapted(decoder(name), fused=choice) for choice in (True, False))
    assert len(fused_layers(fused)) == SIZES["num_hidden_layers"]
    loss, grads = loss_and_grads(fused)
    expected_loss, expected = loss_and_grads(generic)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    assert len(grads) == 2 * SIZES["num_hidden_layers"] * len(FAMILIES[name].target_modules)
    assert distance(grads, expected) < 2e-5
    assert all(layer._told == set() for layer in fused_layers(fused))


def test_every_fused_family_is_among_the_decoders_of_the_other_tests() -> None:
    assert {model_type for model_type, _ in DECODERS.values()} == set(FUSED)


# ---- Recomputation ----


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_keeps_what_a_block_has_and_changes_no_bit(name: str) -> None:
    policy = POLICIES[name]
    assert policy.keeps <= {"qkv", "attention", "mid", "gate_up"}
    assert not (policy.offload and "gate_up" in policy.keeps)
    model = adapted(decoder(FUSED[0], torch.bfloat16), fused=True, recompute="none")
    loss, grads = loss_and_grads(model)
    set_recomputation(model, name)
    again, recomputed = loss_and_grads(model)
    assert torch.equal(loss, again)
    assert all(torch.equal(grads[key], recomputed[key]) for key in grads)


def test_no_two_policies_are_one() -> None:
    assert len(set(POLICIES.values())) == len(POLICIES)


# ---- Attention ----

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BATCH, LENGTH, HEADS, KV_HEADS, HEAD_DIM, SCALE = 2, 40, 4, 2, 64, 0.2
BOUNDARIES = [0, 13, 40, 41, 80]
BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def cases(device: str) -> list[AttentionCase]:
    capability = torch.cuda.get_device_capability() if device == "cuda" else (0, 0)
    return [
        AttentionCase(device, capability, dtype, LENGTH, HEADS, KV_HEADS, HEAD_DIM, packed, window, deterministic)
        for dtype, packed, window, deterministic in itertools.product(BOUNDS, (False, True), (None, 7), (False, True))
    ]


def by_autograd(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, seen: Tensor) -> list[Tensor]:
    """out, dq, dk and dv in float64."""
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
    queries, keys, values = (x.transpose(1, 2) for x in leaves)
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, dim=1) for x in (keys, values))
    scores = (queries @ keys.mT * SCALE).masked_fill(~seen, float("-inf"))
    out = (scores.softmax(-1) @ values).transpose(1, 2)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.double())]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ATTENTION)
def test_a_kernel_says_why_it_refuses_and_is_right_where_it_does_not(name: str, device: str) -> None:
    row = ATTENTION[name]
    assert row.name == name
    generator = torch.Generator(device).manual_seed(0)
    for case in cases(device):
        reason = row.refuses(case)
        if reason is not None:
            assert reason
            continue
        if case.deterministic:
            continue  # the same numbers
        shape = (BATCH, LENGTH, HEADS + 2 * KV_HEADS, HEAD_DIM)
        buffer = torch.randn(shape, generator=generator, device=device).to(case.dtype)
        q, k, v = buffer.split([HEADS, KV_HEADS, KV_HEADS], dim=2)
        grad = torch.randn(q.shape, generator=generator, device=device).to(case.dtype)
        bounds = torch.tensor(BOUNDARIES, dtype=torch.int32, device=device) if case.documents else None
        told = {"documents": None if bounds is None else Documents(bounds, 39), "window": case.window}
        out, state = attention_forward(q, k, v, scale=SCALE, backend=name, **told)
        found = [out, *attention_backward(grad, q, k, v, out, state, scale=SCALE, **told)]
        seen = causal_mask(BATCH, LENGTH, q.device, bounds, case.window)
        wanted = by_autograd(q, k, v, grad, seen.view(-1, 1, LENGTH, LENGTH))
        for one, other in zip(found, wanted, strict=True):
            assert one.dtype == case.dtype
            assert float((one.double() - other).norm() / other.norm()) < BOUNDS[case.dtype], case


@pytest.mark.parametrize("device", DEVICES)
def test_some_kernel_takes_every_case(device: str) -> None:
    for case in cases(device):
        assert choose_attention(case).refuses(case) is None


# ---- Optimizers ----


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_learns_and_its_state_is_plain_tensors_in_the_checkpoint(tmp_path: Path, name: str) -> None:
    model = tiny.peft_model()
    trainer = tiny.trainer(tmp_path, model, optim=name, max_steps=16, save_strategy="steps", save_steps=16)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-4:]) < sum(losses[:4])
    for state in trainer.optimizer.state_dict()["state"].values():
        assert all(type(value) in (Tensor, int, float) for value in state.values())
    saved = load_file(checkpoint_path(tmp_path, 16) / "optimizer.safetensors")
    assert len(saved) >= sum(parameter.requires_grad for parameter in model.parameters())
