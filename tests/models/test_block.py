"""The fused block against the generic path: Transformers' layers with PEFT's adapters over quantized linear layers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from decoders import DECODERS, VOCAB, adapted, decoder, distance, ids, loss_and_grads
from peft import LoraConfig
from torch import nn
from transformers.integrations.neftune import activate_neftune

from fourfold.errors import ConfigError
from fourfold.models import block_backward, block_function
from fourfold.models.attention import Documents
from fourfold.models.attention_interface import document_mask
from fourfold.models.block import FusedDecoderLayer, keep_order, set_recomputation
from fourfold.models.block_forward import block_forward, fill_low
from fourfold.models.linear_group import ExtendedWeight
from fourfold.models.preparing import prepare
from fourfold.models.recomputation import POLICIES


def fused_layers(model: nn.Module) -> list[FusedDecoderLayer]:
    return [module for module in model.modules() if isinstance(module, FusedDecoderLayer)]


def took_generic_path(model: nn.Module) -> set[str]:
    return set().union(*(layer._told for layer in fused_layers(model)))


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("kind", ["nf4 in fp32", "dense in float64"])
def test_loss_and_all_gradients_equal_the_generic_path(name: str, kind: str) -> None:
    dtype, bound = (torch.float32, 2e-5) if kind == "nf4 in fp32" else (torch.float64, 1e-6)
    fused = adapted(decoder(name, dtype, quantized=dtype == torch.float32), fused=True)
    generic = adapted(decoder(name, dtype, quantized=dtype == torch.float32), fused=False)
    loss, grads = loss_and_grads(fused)
    expected_loss, expected = loss_and_grads(generic)
    assert len(fused_layers(fused)) == 2
    assert took_generic_path(fused) == set()
    # Transformers computes its norms in fp32 even here.
    torch.testing.assert_close(loss, expected_loss, rtol=bound / 10, atol=0)
    assert len(expected) == 2 * 7 * 2
    for key, grad in grads.items():
        # The adapters' gradients leave in fp32.
        assert distance({key: grad}, {key: expected[key]}) < bound, key


def test_noise_on_the_embeddings_reaches_the_block_as_the_generic_path() -> None:
    results = []
    for fused in (True, False):
        model = adapted(decoder("llama-gqa"), fused=fused).train()
        clean, _ = loss_and_grads(model)
        activate_neftune(model, 50.0)
        torch.manual_seed(3)
        noisy, grads = loss_and_grads(model)
        assert abs(noisy - clean) > 1e-3
        assert took_generic_path(model) == set()
        results.append((noisy, grads))
    (noisy, grads), (expected_noisy, expected) = results
    torch.testing.assert_close(noisy, expected_noisy, rtol=2e-6, atol=0)
    assert distance(grads, expected) < 2e-5


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3-head-norms"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_with_keep_order_gradients_arrive_as_those_of_the_generic_path(name: str, recompute: str) -> None:
    def order(model: nn.Module) -> list[str]:
        arrived: list[str] = []
        for key, parameter in model.named_parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(lambda _, key=key: arrived.append(key))
        loss_and_grads(model)
        return arrived

    fused = adapted(decoder(name, torch.float32, quantized=True), fused=True)
    set_recomputation(fused, recompute)
    keep_order(fused)
    generic = adapted(decoder(name, torch.float32, quantized=True), fused=False)
    wanted = order(generic)
    assert len(wanted) == 2 * 7 * 2
    assert order(fused) == wanted
    assert took_generic_path(fused) == set()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("name", ["llama-gqa", "qwen2-biases", "qwen3-head-norms", "mistral-window"])
def test_the_fused_path_is_no_further_from_float64_than_the_generic_path(name: str, dtype: torch.dtype) -> None:
    def dense_of(model: Any) -> Any:
        """Its weights as the products see them, in float64, by the generic path."""
        for parent in list(model.modules()):
            for key, module in parent.named_children():
                if hasattr(module, "dense"):
                    setattr(parent, key, module.dense(dtype))
        return model.double()

    truth_loss, truth = loss_and_grads(adapted(dense_of(decoder(name, dtype)), fused=False))
    losses, errors = [], []
    for fused in (True, False):
        loss, grads = loss_and_grads(adapted(decoder(name, dtype), fused=fused))
        losses.append(abs(float(loss - truth_loss)))
        errors.append(distance(grads, truth))
    assert errors[0] < {torch.float32: 1e-5}.get(dtype, 0.05)
    # Where nothing is rounded to 16 bits, a few units of the last place decide, by the order of summation.
    assert errors[0] <= errors[1] * (1.5 if dtype == torch.float32 else 1.1)
    assert losses[0] <= losses[1] + 2 * float(torch.finfo(dtype).eps)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", ["llama-gqa", "qwen3-head-norms", "qwen2-biases"])
def test_no_policy_of_recomputation_changes_a_bit(name: str, policy: str) -> None:
    model = adapted(decoder(name, torch.bfloat16), fused=True, recompute="none")
    loss, grads = loss_and_grads(model)
    set_recomputation(model, policy)
    again, recomputed = loss_and_grads(model)
    assert torch.equal(loss, again)
    assert all(torch.equal(grads[key], recomputed[key]) for key in grads)


def test_each_layer_can_have_a_policy_of_its_own() -> None:
    model = adapted(decoder("llama-gqa"), fused=True, recompute=["none", "full_offload"])
    assert [layer.recompute for layer in fused_layers(model)] == ["none", "full_offload"]
    generic = adapted(decoder("llama-gqa"), fused=False)
    assert distance(loss_and_grads(model)[1], loss_and_grads(generic)[1]) < 1e-5


def test_the_mlp_in_parts_gives_what_it_gives_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(decoder("llama-gqa", torch.float64, quantized=False), fused=True, recompute="selective")
    _, whole = loss_and_grads(model)
    monkeypatch.setattr("fourfold.models.block_state.MLP_TOKENS", 5)
    _, parts = loss_and_grads(model)
    assert distance(parts, whole) < 1e-6


@pytest.mark.parametrize("r", [1, 3, 16, 33, 256])
def test_any_rank_from_1_to_256_equals_the_generic_path(r: int) -> None:
    fused = adapted(decoder("llama-gqa"), fused=True, r=r)
    generic = adapted(decoder("llama-gqa"), fused=False, r=r)
    assert distance(loss_and_grads(fused)[1], loss_and_grads(generic)[1]) < 1e-5
    assert took_generic_path(fused) == set()


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["down_proj"]},
        {"target_modules": ["o_proj", "up_proj"]},
        {"layers_to_transform": [1], "target_modules": ["q_proj", "down_proj"]},
        {"rank_pattern": {"k_proj": 2, "gate_proj": 7}, "alpha_pattern": {"gate_proj": 3}},
        {"use_rslora": True},
    ],
    ids=["q and v", "down", "o and up", "last layer", "ranks differ", "rslora"],
)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_adapters_on_some_layers_or_projections_only_equal_the_generic_path(
    lora: dict[str, Any], recompute: str
) -> None:
    lora = {"target_modules": "all-linear", **lora}
    fused = adapted(decoder("llama-gqa"), fused=True, recompute=recompute, **lora)
    generic = adapted(decoder("llama-gqa"), fused=False, **lora)
    assert distance(loss_and_grads(fused)[1], loss_and_grads(generic)[1]) < 1e-5
    assert took_generic_path(fused) == set()


def test_two_adapters_on_one_model_alone_and_together_equal_the_generic_path() -> None:
    models = []
    for fused in (True, False):
        model = adapted(decoder("llama-gqa"), fused=fused)
        model.add_adapter("second", LoraConfig(r=3, lora_alpha=12, target_modules=["q_proj", "up_proj"]))
        torch.manual_seed(5)
        for key, parameter in model.named_parameters():
            if "second" in key:
                parameter.data.normal_(std=0.05)
        models.append(model)
    fused_model, generic = models
    for active in (["default"], ["second"], ["default", "second"]):
        for model in models:
            model.base_model.set_adapter(active)
        ours, reference = loss_and_grads(fused_model), loss_and_grads(generic)
        torch.testing.assert_close(ours[0], reference[0], rtol=1e-6, atol=0)
        assert distance(ours[1], reference[1]) < 1e-5
    with torch.no_grad(), fused_model.disable_adapter(), generic.disable_adapter():
        torch.testing.assert_close(fused_model(ids()).logits, generic(ids()).logits)
    assert took_generic_path(fused_model) == {"a key-value cache is in use"}


def test_gradients_keep_nothing_else_alive() -> None:
    model = adapted(decoder("llama-gqa"), fused=True, r=3)
    model.add_adapter("second", LoraConfig(r=5, target_modules=["q_proj", "up_proj"]))
    for active in (["default"], ["default", "second"]):
        model.base_model.set_adapter(active)
        loss_and_grads(model)
        grads = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        storages = {grad.untyped_storage().data_ptr(): grad.untyped_storage().nbytes() for grad in grads}
        assert sum(storages.values()) == sum(grad.nbytes for grad in grads)


@pytest.mark.parametrize(
    ("frozen", "trained"),
    [
        (("lora_B", "layers.0"), 7),
        (("gate_proj.lora_B", "down_proj.lora_A"), 24),
        (("up_proj.lora_B", "self_attn"), 10),
        (("gate_proj", "up_proj.lora_B", "down_proj.lora_A"), 20),
    ],
)
def test_frozen_adapters_take_part_and_get_no_gradient(frozen: tuple[str, ...], trained: int) -> None:
    models = [adapted(decoder("llama-gqa"), fused=fused) for fused in (True, False)]
    for model in models:
        for key, parameter in model.named_parameters():
            if any(part in key for part in frozen):
                parameter.requires_grad_(False)
    ours, reference = (loss_and_grads(model)[1] for model in models)
    assert len(ours) == trained
    assert distance(ours, reference) < 1e-5


def test_what_is_kept_of_a_group_without_adapters_keeps_no_activation_alive() -> None:
    low = fill_low(torch.randn(5, 16), ExtendedWeight(torch.randn(24, 16), rows=24, columns=16))
    assert low.shape == (5, 0)
    assert low.untyped_storage().nbytes() == 0


def test_packed_documents_equal_the_same_documents_one_by_one() -> None:
    model = adapted(decoder("llama-gqa", torch.float64, quantized=False), fused=True)
    lengths = [4, 1, 6]
    tokens = ids(1, sum(lengths))
    boundaries = torch.tensor([0, 4, 5, 11], dtype=torch.int32)
    packed = model(
        input_ids=tokens,
        position_ids=torch.cat([torch.arange(length) for length in lengths])[None],
        cu_seq_lens_q=boundaries,
        cu_seq_lens_k=boundaries,
        max_length_q=6,
        max_length_k=6,
        use_cache=False,
    ).logits
    apart = torch.cat([model(input_ids=part, use_cache=False).logits for part in tokens.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(packed, apart, rtol=1e-9, atol=1e-9)
    assert took_generic_path(model) == set()


def test_parameter_names_and_what_is_saved_are_those_of_the_generic_path() -> None:
    fused, generic = (adapted(decoder("qwen3-head-norms"), fused=choice) for choice in (True, False))
    assert list(fused.state_dict()) == list(generic.state_dict())
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in generic.named_modules()]
    assert all(torch.equal(value, generic.state_dict()[name]) for name, value in fused.state_dict().items())


def test_hidden_states_of_all_layers_can_still_be_asked_for() -> None:
    fused, generic = (adapted(decoder("llama-gqa"), fused=choice) for choice in (True, False))
    with torch.no_grad():
        ours, theirs = (m(ids(), output_hidden_states=True, use_cache=False).hidden_states for m in (fused, generic))
    assert len(ours) == len(theirs) == 3
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(
    ("lora", "reason"),
    [
        ({"lora_dropout": 0.1}, "lora_dropout is above 0"),
        ({"use_dora": True}, "the adapter is no plain LoRA but a QuantizedDoraVariant"),
    ],
)
def test_what_the_block_cannot_do_falls_back_and_says_so_once(
    lora: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="fourfold")
    fused = adapted(decoder("llama-gqa"), fused=True, **lora)
    generic = adapted(decoder("llama-gqa"), fused=False, **lora)
    results = []
    for model in (fused, generic, fused):
        torch.manual_seed(0)
        results.append(loss_and_grads(model))
    assert distance(results[0][1], results[1][1]) < 1e-6
    assert took_generic_path(fused) == {reason}
    said = [record.message for record in caplog.records if "generic path" in record.message]
    assert len(said) == 1
    assert reason in said[0]


def test_an_activation_without_a_kernel_takes_the_generic_path() -> None:
    fused, generic = (adapted(decoder("llama", hidden_act="relu"), fused=choice) for choice in (True, False))
    assert distance(loss_and_grads(fused)[1], loss_and_grads(generic)[1]) < 1e-6
    assert took_generic_path(fused) == {"hidden_act is relu"}


def test_rows_that_are_told_as_documents_are_plain_rows() -> None:
    model = adapted(decoder("llama-gqa"), fused=True)
    layer = fused_layers(model)[0]
    hidden, rotation = torch.randn(2, 11, 64), (torch.ones(1, 11, 16), torch.zeros(1, 11, 16))
    rows, packed = torch.tensor([0, 11, 22], dtype=torch.int32), torch.tensor([0, 4, 11, 22], dtype=torch.int32)
    for bounds, documents in ((rows, False), (packed, True)):
        mask = document_mask(Documents(bounds, 11))
        block = layer._block(hidden, attention_mask=mask, position_embeddings=rotation)
        assert (block.documents is not None) is documents


def test_a_hook_on_a_module_inside_the_block_still_runs() -> None:
    model = adapted(decoder("llama-gqa"), fused=True)
    seen = []
    layer = model.get_base_model().model.layers[0]
    layer.mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    loss_and_grads(model)
    assert seen == [1]


def test_a_padded_batch_and_a_cache_take_the_generic_path_with_its_numbers() -> None:
    fused, generic = (adapted(decoder("llama-gqa"), fused=choice).eval() for choice in (True, False))
    mask = torch.ones(2, 11, dtype=torch.int64)
    mask[1, :4] = 0
    with torch.no_grad():
        ours, theirs = (m(ids(), attention_mask=mask, use_cache=False).logits for m in (fused, generic))
    torch.testing.assert_close(ours[0], theirs[0])
    torch.testing.assert_close(ours[1, 4:], theirs[1, 4:])
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "attention_mask": mask}
    assert torch.equal(fused.generate(ids(), **options), generic.generate(ids(), **options))
    # Without padding it is the cache alone that the block has to see.
    options["attention_mask"] = torch.ones_like(mask)
    assert torch.equal(fused.generate(ids(), **options), generic.generate(ids(), **options))


def test_a_second_backward_pass_is_refused_since_the_first_used_the_memory() -> None:
    model = adapted(decoder("llama-gqa"), fused=True)
    loss = model(ids(), use_cache=False).logits.square().sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="backward pass twice"):
        loss.backward()


def test_a_gradient_of_a_gradient_is_refused() -> None:
    model = adapted(decoder("llama-gqa"), fused=True)
    loss = model(ids(), use_cache=False).logits.square().sum()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    grads = torch.autograd.grad(loss, trained, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        sum(grad.square().sum() for grad in grads).backward()


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("targets", [["q_proj", "up_proj"], ["o_proj", "down_proj"]])
def test_low_rank_columns_keep_nothing_else_alive(
    recompute: str, targets: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[torch.Tensor | None] = []
    recompute_half = block_backward._attention_half

    def forward(*arguments: Any) -> Any:
        out, saved = block_forward(*arguments)
        kept.extend([saved.low_qkv, saved.low_out, saved.low_gate_up, saved.low_down])
        return out, saved

    def attention_half(*arguments: Any) -> Any:
        half = recompute_half(*arguments)
        kept.append(half.normed.low)
        return half

    monkeypatch.setattr(block_function, "block_forward", forward)
    monkeypatch.setattr(block_backward, "_attention_half", attention_half)
    loss_and_grads(adapted(decoder("llama-gqa"), fused=True, recompute=recompute, target_modules=targets))
    present = [low for low in kept if low is not None]
    assert present
    assert all(low.untyped_storage().nbytes() == low.nbytes for low in present)


def test_gradient_checkpointing_of_transformers_turns_recomputation_on_and_off() -> None:
    model = adapted(decoder("llama-gqa"), fused=True)
    _, kept = loss_and_grads(model)
    model.gradient_checkpointing_enable()
    assert all(layer._checkpoints for layer in fused_layers(model))
    _, recomputed = loss_and_grads(model)
    assert distance(recomputed, kept) == 0
    model.gradient_checkpointing_disable()
    assert not any(layer._checkpoints for layer in fused_layers(model))


@pytest.mark.parametrize(
    ("recompute", "found"),
    [("everything", "everything"), (["none"], "1 names"), (["none", "some"], "some")],
)
def test_an_unknown_policy_or_a_wrong_number_of_them_is_refused(recompute: Any, found: str) -> None:
    with pytest.raises(ConfigError, match=found):
        adapted(decoder("llama-gqa"), fused=True, recompute=recompute)


def test_a_policy_without_fused_blocks_is_refused() -> None:
    with pytest.raises(ConfigError, match="fused"):
        prepare(decoder("llama-gqa"), LoraConfig(r=2), fused=False, recompute="none")
    with pytest.raises(ConfigError, match="fused"):
        prepare(decoder("gemma"), LoraConfig(r=2), fused=True, recompute="none")


def test_merging_and_unloading_work_on_fused_blocks() -> None:
    fused, generic = (adapted(decoder("llama-gqa"), fused=choice) for choice in (True, False))
    merged, expected = fused.merge_and_unload(), generic.merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(merged(ids(), use_cache=False).logits, expected(ids(), use_cache=False).logits)
    assert merged.config.vocab_size == VOCAB


def test_a_copied_model_trains_by_itself() -> None:
    model = adapted(decoder("llama-gqa"), fused=True, recompute="selective_offload")
    _, expected = loss_and_grads(model)
    twin = copy.deepcopy(model)
    layers, twins = fused_layers(model), fused_layers(twin)
    assert twins[0]._offload is twins[1]._offload
    assert twins[0]._offload is not layers[0]._offload
    assert twins[0]._graphs is not layers[0]._graphs
    assert [layer.recompute for layer in twins] == ["selective_offload"] * 2
    assert distance(loss_and_grads(twin)[1], expected) == 0
