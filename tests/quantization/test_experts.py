"""Mixture models whose experts are 3-D parameters: none of them is left in 16 bits."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from fourfold import FourfoldConfig, load_model, quantize_model
from fourfold.errors import QuantizationError
from fourfold.quantization.experts import quantized_parameters
from fourfold.quantization.linear import QuantizedLinear

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 99,
}
IDS = torch.arange(24).reshape(2, 12)


@pytest.fixture(scope="module", params=["mixtral", "qwen3_moe"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    if request.param == "mixtral":
        model: PreTrainedModel = MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))
    else:
        model = Qwen3MoeForCausalLM(
            Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, head_dim=8)
        )
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder


def load_quantized(folder: Path, **options: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=FourfoldConfig(**options))


def experts(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{path}.{name}": tensor.dequantize()
        for path, module in model.named_modules()
        for name, tensor in quantized_parameters(module).items()
    }


def dequantized_twin(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The ordinary model with the dequantized weights."""
    twin = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for name, tensor in experts(model).items():
            twin.get_parameter(name).copy_(tensor)
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                twin.get_submodule(name).weight.copy_(module.quantized.dequantize())
    return twin


def test_all_experts_are_quantized_and_compute_what_their_dequantized_twin_does(checkpoint: Path) -> None:
    model = load_quantized(checkpoint)
    assert len(experts(model)) == 4
    assert not [name for name, parameter in model.named_parameters() if parameter.ndim == 3]
    torch.testing.assert_close(model(IDS).logits, dequantized_twin(model, checkpoint)(IDS).logits)


@pytest.mark.parametrize("name", ["nf4", "int8"])
def test_a_checkpoint_with_experts_is_written_and_read_again(checkpoint: Path, tmp_path: Path, name: str) -> None:
    model = load_quantized(checkpoint, bnb_4bit_quant_type=name)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    again = load_model(tmp_path, device="cpu", dtype=torch.float32)
    expected = experts(model)
    read = experts(again)
    assert expected.keys() == read.keys()
    assert all(torch.equal(read[key], tensor) for key, tensor in expected.items())
    assert torch.equal(again(IDS).logits, model(IDS).logits)


def test_experts_compute_in_the_dtype_that_the_model_is_loaded_in(checkpoint: Path, tmp_path: Path) -> None:
    load_quantized(checkpoint).save_pretrained(tmp_path)
    model = load_model(tmp_path, device="cpu", dtype=torch.bfloat16)
    assert model(IDS).logits.dtype == torch.bfloat16
    expected = experts(model)
    assert model.to(torch.float32)(IDS).logits.dtype == torch.float32
    assert all(torch.equal(tensor, expected[key]) for key, tensor in experts(model).items())


def test_a_model_in_memory_is_quantized_to_the_same_codes(checkpoint: Path) -> None:
    streamed = load_quantized(checkpoint)
    quantized = quantize_model(AutoModelForCausalLM.from_pretrained(checkpoint))
    assert all(torch.equal(tensor, experts(streamed)[key]) for key, tensor in experts(quantized).items())
    assert torch.equal(quantized(IDS).logits, streamed(IDS).logits)


def test_a_state_dict_of_experts_is_loaded(checkpoint: Path) -> None:
    source, target = load_quantized(checkpoint), load_quantized(checkpoint, bnb_4bit_quant_type="fp4")
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(IDS).logits, source(IDS).logits)


def test_a_deep_copy_is_independent(checkpoint: Path) -> None:
    model = load_quantized(checkpoint)
    other = copy.deepcopy(model)
    expected = model(IDS).logits
    for name, parameter in model.named_parameters():
        if "experts" in name:
            parameter.data.zero_()
    assert torch.equal(other(IDS).logits, expected)


def test_gradients_under_checkpointing_are_those_of_the_dequantized_twin(checkpoint: Path) -> None:
    model = load_quantized(checkpoint)
    twin = dequantized_twin(model, checkpoint)
    gradients = []
    for each in (model, twin):
        each.train()
        each.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        each.requires_grad_(False)
        weight = each.get_input_embeddings().weight.requires_grad_()
        each(IDS, labels=IDS).loss.backward()
        gradients.append(weight.grad)
    torch.testing.assert_close(*gradients)


def test_experts_left_out_by_name_stay_dense_and_are_read_so(checkpoint: Path, tmp_path: Path) -> None:
    model = load_quantized(checkpoint, modules_to_not_convert=["layers.0.mlp"])
    assert len(experts(model)) == 2
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path, device="cpu", dtype=torch.float32)
    assert experts(again).keys() == experts(model).keys()
    assert torch.equal(again(IDS).logits, model(IDS).logits)


class Oddity(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixing = nn.Parameter(torch.zeros(3, 4, 5))


def test_a_3d_parameter_of_unknown_kind_is_refused_by_name() -> None:
    model = nn.Sequential(nn.Linear(4, 4), Oddity())
    with pytest.raises(QuantizationError, match=r"1\.mixing \(3, 4, 5\) of Oddity"):
        quantize_model(model)
    quantized = quantize_model(model, FourfoldConfig(modules_to_not_convert=["1.mixing"]))
    assert isinstance(quantized[0], QuantizedLinear)
