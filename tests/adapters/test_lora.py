from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLoraLinear
from torch import nn
from transformers import PreTrainedModel
from twins import copy_adapters, dense_twin, quantized_model, randomise, tokens

from fourfold.adapters.lora import LoraQuantizedLinear, register
from fourfold.errors import AdapterError
from fourfold.models.preparing import prepare
from fourfold.quantization.linear import QuantizedLinear

TARGETS = ["q_proj", "v_proj", "up_proj", "down_proj"]


def lora_config(**options: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 12, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options})


def pair(config: LoraConfig, **model_options: Any) -> tuple[PeftModel, PeftModel]:
    """Our model, and PEFT's own over the dense model with the same weights."""
    base: PreTrainedModel = quantized_model(**model_options)
    reference = get_peft_model(dense_twin(base), config)
    ours = randomise(prepare(base, config))
    copy_adapters(ours, reference)
    return ours.eval(), reference.eval()


def logits(model: nn.Module, **options: Any) -> torch.Tensor:
    return model(input_ids=tokens(), **options).logits


def loss_and_gradients(model: nn.Module) -> tuple[float, dict[str, torch.Tensor]]:
    loss = model(input_ids=tokens(), labels=tokens()).loss
    loss.backward()
    return float(loss), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def layer(dtype: torch.dtype, **options: Any) -> LoraQuantizedLinear:
    torch.manual_seed(2)
    base = QuantizedLinear.from_linear(nn.Linear(48, 40, dtype=dtype))
    made = LoraQuantizedLinear(base, "default", register(lora_config(**options)), r=4, lora_alpha=12)
    # As get_peft_model does it; PEFT's layer by itself follows the base's dtype.
    made.lora_A.float(), made.lora_B.float()
    nn.init.normal_(made.lora_A["default"].weight)
    nn.init.normal_(made.lora_B["default"].weight)
    return made


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_output_and_gradients_agree_with_float64_arithmetic(dtype: torch.dtype, bound: float) -> None:
    made = layer(dtype)
    x = torch.randn(3, 5, 48).to(dtype).requires_grad_()
    upstream = torch.randn(3, 5, 40).to(dtype)
    out = made(x)
    out.backward(upstream)

    x64 = x.detach().double().requires_grad_()
    a = made.lora_A["default"].weight.detach().double().requires_grad_()
    b = made.lora_B["default"].weight.detach().double().requires_grad_()
    weight = made.get_base_layer().quantized.dequantize(dtype).double()
    expected = x64 @ weight.T + made.get_base_layer().bias.double() + 3.0 * (x64 @ a.T) @ b.T
    expected.backward(upstream.double())

    def error(value: torch.Tensor, reference: torch.Tensor) -> float:
        return float((value.detach().double() - reference.detach()).norm() / reference.detach().norm())

    assert out.dtype == x.grad.dtype == dtype
    assert error(out, expected) < bound
    assert error(x.grad, x64.grad) < bound
    assert error(made.lora_A["default"].weight.grad, a.grad) < bound
    assert error(made.lora_B["default"].weight.grad, b.grad) < bound


def test_gradients_of_a_and_b_are_fp32_and_not_rounded_to_the_inputs_dtype() -> None:
    made = layer(torch.bfloat16)
    made(torch.randn(64, 48).bfloat16()).sum().backward()
    for factor in (made.lora_A, made.lora_B):
        gradient = factor["default"].weight.grad
        assert gradient.dtype == torch.float32
        assert not torch.equal(gradient, gradient.bfloat16().float())


def test_an_input_that_needs_no_gradient_gets_none() -> None:
    made = layer(torch.float32)
    x = torch.randn(4, 48)
    made(x).sum().backward()
    assert x.grad is None
    assert made.lora_A["default"].weight.grad is not None


@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"lora_bias": True}, {"use_dora": True}, {"rank_pattern": {"q_proj": 2}}],
    ids=["lora", "rslora", "lora_bias", "dora", "rank_pattern"],
)
@pytest.mark.parametrize("attention_bias", [False, True], ids=["plain", "biased"])
def test_model_equals_pefts_over_the_dequantized_weights(options: dict[str, Any], attention_bias: bool) -> None:
    ours, reference = pair(lora_config(**options), attention_bias=attention_bias)
    torch.testing.assert_close(logits(ours), logits(reference), rtol=1e-4, atol=1e-5)
    (loss, gradients), (wanted_loss, wanted) = loss_and_gradients(ours), loss_and_gradients(reference)
    assert loss == pytest.approx(wanted_loss, rel=1e-5)
    assert set(gradients) == set(wanted)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], rtol=1e-3, atol=1e-5)


def test_dora_starts_as_the_base_model() -> None:
    base = quantized_model()
    before = logits(base)
    after = logits(prepare(base, lora_config(use_dora=True)).eval())
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_dora", [False, True])
def test_bf16_model_agrees_with_pefts_within_bf16(use_dora: bool) -> None:
    ours, reference = pair(lora_config(use_dora=use_dora), dtype=torch.bfloat16)
    got, wanted = logits(ours), logits(reference)
    assert got.dtype == torch.bfloat16
    assert float((got - wanted).float().norm() / wanted.float().norm()) < 2e-2


@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_equals_pefts_under_the_same_seed_and_is_off_in_eval(use_dora: bool) -> None:
    ours, reference = pair(lora_config(lora_dropout=0.5, use_dora=use_dora))
    quiet = logits(ours)
    torch.manual_seed(11)
    got = logits(ours.train())
    torch.manual_seed(11)
    wanted = logits(reference.train())
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, quiet)
    torch.testing.assert_close(logits(ours.eval()), quiet)


def two_adapters() -> tuple[PeftModel, PeftModel]:
    first, second = lora_config(), lora_config(r=2, target_modules=["q_proj", "o_proj"])
    base = quantized_model()
    reference = get_peft_model(dense_twin(base), first)
    reference.add_adapter("second", second)
    ours = prepare(base, first)
    ours.add_adapter("second", register(second))
    copy_adapters(randomise(ours), reference)
    return ours.eval(), reference.eval()


def test_two_adapters_are_switched_added_up_and_disabled_as_in_peft() -> None:
    ours, reference = two_adapters()
    plain = logits(dense_twin(quantized_model()))
    seen = [plain]
    for active in ("default", "second", ["default", "second"]):
        for model in (ours, reference):
            model.base_model.set_adapter(active)
        torch.testing.assert_close(logits(ours), logits(reference), rtol=1e-4, atol=1e-5)
        assert not any(torch.allclose(logits(ours), other) for other in seen)
        seen.append(logits(ours))
        with ours.disable_adapter():
            torch.testing.assert_close(logits(ours), plain, rtol=1e-4, atol=1e-5)


def test_each_row_of_a_batch_can_have_its_own_adapter() -> None:
    ours, reference = two_adapters()
    for names in (["default", "second"], ["__base__", "default"]):
        with torch.no_grad():
            got, wanted = logits(ours, adapter_names=names), logits(reference, adapter_names=names)
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_layers_without_an_adapter_stay_quantized_linears() -> None:
    model = prepare(quantized_model(), lora_config(target_modules=["q_proj"], layers_to_transform=[1]))
    adapted = [name for name, module in model.named_modules() if isinstance(module, LoraQuantizedLinear)]
    assert adapted == ["base_model.model.model.layers.1.self_attn.q_proj"]
    assert type(model.get_submodule("base_model.model.model.layers.0.self_attn.q_proj")) is QuantizedLinear


def test_a_layer_that_was_left_dense_gets_pefts_own_adapter() -> None:
    model = prepare(quantized_model(), lora_config(target_modules=["q_proj", "lm_head"]))
    assert type(model.base_model.model.lm_head) is PeftLoraLinear


def test_under_autocast_the_products_are_in_its_dtype_and_the_gradients_in_fp32() -> None:
    ours, reference = pair(lora_config())
    with torch.autocast("cpu", torch.bfloat16):
        got = ours(input_ids=tokens(), labels=tokens())
        wanted = reference(input_ids=tokens(), labels=tokens())
        layer_out = ours.base_model.model.model.layers[0].self_attn.q_proj(torch.randn(2, 64))
    assert layer_out.dtype == torch.bfloat16
    assert float(got.loss) == pytest.approx(float(wanted.loss), rel=1e-2)
    got.loss.backward()
    assert all(p.grad.dtype == torch.float32 for p in ours.parameters() if p.requires_grad)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant: bool) -> None:
    ours, _ = pair(lora_config())
    ours.train()
    _, wanted = loss_and_gradients(ours)
    wanted = {name: gradient.clone() for name, gradient in wanted.items()}
    ours.zero_grad()
    ours.enable_input_require_grads()
    ours.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    _, gradients = loss_and_gradients(ours)
    assert set(gradients) >= set(wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(gradients[name], gradient)


def test_only_the_adapters_are_trained() -> None:
    model = prepare(quantized_model(), lora_config())
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable
    assert all("lora_" in name for name in trainable)
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("method", ["pissa", "olora", "corda"])
def test_initialisations_that_read_the_base_weight_are_refused_by_the_layer(method: str) -> None:
    base = QuantizedLinear.from_linear(nn.Linear(16, 16))
    with pytest.raises(AdapterError, match=f"init_lora_weights='{method}'"):
        LoraQuantizedLinear(base, "default", lora_config(init_lora_weights=method), r=4, lora_alpha=8)


def test_variants_that_need_a_dense_weight_are_refused() -> None:
    config = register(lora_config(alora_invocation_tokens=[1, 2]))
    with pytest.raises(AdapterError, match="variant of LoRA"):
        get_peft_model(quantized_model(), config)
