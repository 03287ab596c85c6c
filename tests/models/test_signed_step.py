"""What one step of learning changes is there in a 16-bit model's loss, as in fp32."""

from __future__ import annotations

import pytest
import torch
from decoders import VOCAB, decoder, loss_and_grads
from peft import LoraConfig

from fourfold.models.block_forward import attention_output
from fourfold.models.linear_group import ExtendedWeight
from fourfold.models.preparing import prepare

LEARNING_RATE = 1e-4


def signed_step(name: str, dtype: torch.dtype, fused: bool, seed: int) -> tuple[float, float]:
    """How far the loss falls by one step of Adam from B = 0, and how far by its gradients: lr * sum |g|."""
    torch.manual_seed(seed)
    config = LoraConfig(r=8, lora_alpha=8, lora_dropout=0.0)
    model = prepare(decoder(name, dtype, num_hidden_layers=4), config, fused=fused)
    batch = torch.randint(3, VOCAB, (32, 64), generator=torch.Generator().manual_seed(seed))
    before, grads = loss_and_grads(model, input_ids=batch)
    with torch.no_grad():
        for key, grad in grads.items():
            model.get_parameter(key).sub_(LEARNING_RATE * grad.sign())
    after, _ = loss_and_grads(model, input_ids=batch)
    return float(before - after), LEARNING_RATE * sum(float(grad.abs().sum()) for grad in grads.values())


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "generic"])
@pytest.mark.parametrize("name", ["llama-gqa", "qwen3-head-norms", "qwen2-biases"])
def test_a_first_step_in_bf16_lowers_the_loss_as_its_gradients_say(name: str, fused: bool) -> None:
    # A sum that is rounded before the adapter's product is added keeps 0.15 of it: B is tiny after one step.
    falls, expected = zip(*(signed_step(name, torch.bfloat16, fused, seed) for seed in range(4)), strict=True)
    assert 0.6 < sum(falls) / sum(expected) < 1.4


def test_a_first_step_in_fp32_lowers_the_loss_as_its_gradients_say() -> None:
    fall, expected = signed_step("llama-gqa", torch.float32, fused=False, seed=0)
    assert fall == pytest.approx(expected, rel=0.05)


def test_the_attention_outputs_adapter_is_not_lost_beside_the_output() -> None:
    torch.manual_seed(0)
    attention = torch.randn(4096, 64).bfloat16()
    data = torch.cat([torch.randn(80, 64) / 8, torch.randn(80, 16) * 2e-4], dim=1)
    weight = ExtendedWeight(data.bfloat16(), 64, 64)
    assert weight.up is not None
    out, low = attention_output(attention, weight)
    assert low is not None
    delta = low.double() @ weight.up.double()
    base = attention.double() @ weight.backward[: weight.rows].double().T
    moved = out.double() - base
    assert float((moved * delta).sum() / delta.square().sum()) == pytest.approx(1, abs=0.25)
