"""The fused block with its kernels on a GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from decoders import DECODERS, adapted, decoder, distance, ids, loss_and_grads

from fourfold.models.attention import Documents
from fourfold.models.attention_interface import document_mask
from fourfold.models.block import FusedDecoderLayer, set_recomputation
from fourfold.models.recomputation import POLICIES

pytestmark = pytest.mark.gpu

# Sizes that the kernels take, so that none of them is passed by.
LARGER: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "initializer_range": 0.04,
    "max_position_embeddings": 1024,
}
# What a name stands for, at those sizes.
LARGER_BY_NAME: dict[str, dict[str, Any]] = {
    "llama-mha": {"num_key_value_heads": 8},
    "llama-mqa-tied": {"num_key_value_heads": 1},
    # Rows of no whole blocks of 64, heads whose halves are no powers of two.
    "llama-odd": {
        "hidden_size": 360,
        "intermediate_size": 1100,
        "num_attention_heads": 5,
        "num_key_value_heads": 1,
        "head_dim": 72,
    },
}


def larger(name: str) -> dict[str, Any]:
    return LARGER | LARGER_BY_NAME.get(name, {})


def took_generic_path(model: torch.nn.Module) -> set[str]:
    return set().union(*(layer._told for layer in model.modules() if isinstance(layer, FusedDecoderLayer)))


def truth(
    name: str, dtype: torch.dtype, tokens: torch.Tensor, sizes: dict[str, Any] | None = None, **lora: Any
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """In float64 by the generic path, with the weights as the products see them."""
    model = decoder(name, dtype, device="cuda", **(sizes or larger(name)))
    for parent in list(model.modules()):
        for key, module in parent.named_children():
            if hasattr(module, "dense"):
                setattr(parent, key, module.dense(dtype))
    return loss_and_grads(adapted(model.double(), fused=False, **lora), input_ids=tokens)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.bfloat16) for name in DECODERS),
        ("llama-odd", torch.float16),
        ("qwen3-head-norms", torch.float16),
        ("llama-gqa", torch.float32),
        ("qwen2-biases", torch.float32),
        ("smollm3-no-rope", torch.float32),
    ],
)
def test_the_fused_path_is_no_further_from_float64_than_the_generic_path(name: str, dtype: torch.dtype) -> None:
    tokens = ids(2, 300, device="cuda")
    true_loss, true_grads = truth(name, dtype, tokens, r=16)
    errors, losses = [], []
    for fused in (True, False):
        model = adapted(decoder(name, dtype, device="cuda", **larger(name)), fused=fused, r=16)
        loss, grads = loss_and_grads(model, input_ids=tokens)
        assert took_generic_path(model) == set()
        errors.append(distance(grads, true_grads))
        losses.append(abs(float(loss - true_loss)))
    assert errors[0] < {torch.float32: 1e-4}.get(dtype, 0.05)
    # Where nothing is rounded to 16 bits, a few units of the last place decide, by the order of summation.
    assert errors[0] <= errors[1] * (1.5 if dtype == torch.float32 else 1.05)
    assert losses[0] <= losses[1] + float(torch.finfo(dtype).eps)


@pytest.mark.parametrize("r", [1, 8, 24, 64, 256])
def test_any_rank_agrees_with_the_generic_path(r: int) -> None:
    tokens = ids(2, 200, device="cuda")
    _, true_grads = truth("qwen2-biases", torch.bfloat16, tokens, r=r)
    errors = []
    for fused in (True, False):
        model = adapted(decoder("qwen2-biases", torch.bfloat16, device="cuda", **LARGER), fused=fused, r=r)
        errors.append(distance(loss_and_grads(model, input_ids=tokens)[1], true_grads))
    assert errors[0] <= errors[1] * 1.05


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["gate_proj", "down_proj"]},
        {"target_modules": ["up_proj"]},
        {"target_modules": ["down_proj"]},
        {"target_modules": "all-linear", "rank_pattern": {"gate_proj": 3, "up_proj": 40, "down_proj": 7}},
        {"target_modules": "all-linear", "rank_pattern": {"gate_proj": 72}},
    ],
    ids=["gate and down", "up", "down", "ranks differ", "one rank too many"],
)
def test_adapters_on_some_projections_of_the_mlp_agree_with_the_generic_path(lora: dict[str, Any]) -> None:
    tokens = ids(2, 200, device="cuda")
    _, true_grads = truth("llama-gqa", torch.bfloat16, tokens, **lora)
    errors = []
    for fused in (True, False):
        model = adapted(decoder("llama-gqa", torch.bfloat16, device="cuda", **LARGER), fused=fused, **lora)
        errors.append(distance(loss_and_grads(model, input_ids=tokens)[1], true_grads))
    assert errors[0] <= errors[1] * 1.05


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "v_proj", "o_proj"]},
        {"target_modules": "all-linear", "rank_pattern": {"q_proj": 8, "down_proj": 24, "o_proj": 40}},
    ],
    ids=["all", "q, v and o", "ranks differ"],
)
def test_tokens_enough_for_one_reading_of_a_gradient_agree_with_the_generic_path(lora: dict[str, Any]) -> None:
    sizes = {
        **{"hidden_size": 2048, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 4},
        **{"head_dim": 128, "initializer_range": 0.02, "max_position_embeddings": 2048, "num_hidden_layers": 1},
    }
    tokens = ids(4, 1030, device="cuda")
    models = [
        adapted(decoder("llama-gqa", torch.bfloat16, device="cuda", **sizes), fused=fused, r=16, **lora)
        for fused in (True, False)
    ]
    (loss, grads), (_, generic) = (loss_and_grads(model, input_ids=tokens) for model in models)
    assert took_generic_path(models[0]) == set()
    _, true_grads = truth("llama-gqa", torch.bfloat16, tokens, sizes, r=16, **lora)
    assert distance(grads, true_grads) <= distance(generic, true_grads) * 1.05
    for policy in POLICIES:
        set_recomputation(models[0], policy)
        again, recomputed = loss_and_grads(models[0], input_ids=tokens)
        assert torch.equal(again, loss)
        assert distance(recomputed, grads) < 2e-3


@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_of_recomputation_changes_the_loss_or_more_than_the_order_of_sums_does(policy: str) -> None:
    model = adapted(
        decoder(
            "qwen3-head-norms",
            torch.bfloat16,
            device="cuda",
            **LARGER,
        ),
        fused=True,
        r=16,
    )
    tokens = ids(3, 700, device="cuda")
    loss, grads = loss_and_grads(model, input_ids=tokens)
    set_recomputation(model, policy)
    for _ in range(3):
        again, recomputed = loss_and_grads(model, input_ids=tokens)
        assert torch.equal(loss, again)
        # cuDNN's backward pass of the attention sums in no fixed order.
        assert distance(recomputed, grads) < 2e-3


def test_each_policy_holds_less_between_forward_and_backward_than_the_one_before() -> None:
    changes = copy.deepcopy(LARGER) | {"num_hidden_layers": 8}
    model = adapted(decoder("llama-gqa", torch.bfloat16, device="cuda", **changes), fused=True, r=8).train()
    tokens = ids(4, 1000, device="cuda")
    held = {}
    for policy in POLICIES:
        set_recomputation(model, policy)
        model(input_ids=tokens, use_cache=False).logits.mean().backward()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        logits = model(input_ids=tokens, use_cache=False).logits
        torch.cuda.synchronize()
        held[policy] = torch.cuda.memory_allocated() - before - logits.nbytes
        del logits
    token_bytes = tokens.numel() * 2 * 8
    assert held["none"] > held["mlp"] + token_bytes * 2 * 1408 * 0.9
    assert held["mlp"] > held["selective"] > held["full"] > held["full_offload"]
    # Beyond the input of each layer, two low-rank products of 16 columns are kept, and once for all 8 layers what the
    # model's last norm holds: its input in fp32. 5% are for rotations, labels and the allocator's rounding.
    assert held["full"] < token_bytes * (512 + 2 * 16 + 2 * 512 / 8) * 1.05
    # Of all layers but the last two, nothing is left on the GPU.
    assert held["selective_offload"] < held["selective"] * 0.5


def test_packed_documents_equal_the_same_documents_one_by_one() -> None:
    model = adapted(decoder("llama-gqa", torch.bfloat16, device="cuda", **LARGER), fused=True, r=16)
    lengths = [130, 1, 69, 300]
    tokens = ids(1, sum(lengths), device="cuda")
    boundaries = torch.tensor([0, 130, 131, 200, 500], dtype=torch.int32, device="cuda")
    inputs = {
        "input_ids": tokens,
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None].cuda(),
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": 300,
        "max_length_k": 300,
    }
    with torch.no_grad():
        packed = model(**inputs, use_cache=False).logits.double()
        apart = [model(input_ids=part, use_cache=False).logits for part in tokens.split(lengths, dim=1)]
    apart = torch.cat(apart, dim=1).double()
    assert (packed - apart).norm() / apart.norm() < 0.01
    labels = tokens.clone()
    labels[:, [0, 130, 131, 200]] = -100
    _, grads = loss_and_grads(model, **inputs, labels=labels)
    generic = adapted(decoder("llama-gqa", torch.bfloat16, device="cuda", **LARGER), fused=False, r=16)
    _, expected = loss_and_grads(generic, input_ids=tokens, position_ids=inputs["position_ids"], labels=labels)
    assert distance(grads, expected) < 0.03
    assert took_generic_path(model) == set()


def test_a_step_launches_no_synchronisation() -> None:
    model = adapted(
        decoder("llama-gqa", torch.bfloat16, device="cuda", **LARGER), fused=True, r=16, recompute="full_offload"
    )
    tokens = ids(2, 256, device="cuda")
    # Each row a document, as in training: without a mask, Transformers asks the device whether rows are packed.
    ends = torch.arange(0, tokens.numel() + 1, 256, dtype=torch.int32, device="cuda")
    inputs = {"input_ids": tokens, "attention_mask": document_mask(Documents(ends, 256)), "use_cache": False}
    model.train()
    for _ in range(2):
        model(**inputs).logits.float().mean().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        model(**inputs).logits.float().mean().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert took_generic_path(model) == set()
