from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from twins import dense_twin, original_model, quantized_model, randomise, tokens

from fourfold.adapters.lora import LoraQuantizedLinear
from fourfold.errors import AdapterError, CheckpointError
from fourfold.models.loading import load_model
from fourfold.models.preparing import add_adapter, load_adapter, prepare
from fourfold.quantization.hf_config import FourfoldConfig
from fourfold.quantization.hf_quantizer import quantize_model

LLAMA_LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens()).logits


def adapted_names(model: nn.Module) -> set[str]:
    return {
        name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, LoraQuantizedLinear)
    }


@pytest.fixture
def original(tmp_path: Path) -> Path:
    original_model().save_pretrained(tmp_path / "original")
    return tmp_path / "original"


@pytest.mark.parametrize(
    ("targets", "expected"),
    [
        (None, LLAMA_LINEARS),
        ("all-linear", LLAMA_LINEARS),
        (["q_proj", "mlp.up_proj"], {"q_proj", "up_proj"}),
        (r".*layers\.1\.mlp\.(gate|up)_proj", {"gate_proj", "up_proj"}),
    ],
    ids=["family", "all-linear", "list", "pattern"],
)
def test_targets_mean_the_layers_they_name_and_never_the_output_head(targets: Any, expected: set[str]) -> None:
    config = LoraConfig(r=2, target_modules=targets)
    model = prepare(quantized_model(), config)
    assert adapted_names(model) == expected
    assert not [name for name, _ in model.named_parameters() if "lm_head" in name and "lora" in name]
    assert config.target_modules == (set(targets) if isinstance(targets, list) else targets)


def test_an_unknown_family_gets_every_linear_layer() -> None:
    base = OPTForCausalLM(
        OPTConfig(
            hidden_size=32,
            ffn_dim=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            vocab_size=64,
            word_embed_proj_dim=32,
        )
    )
    model = prepare(quantize_model(base), LoraConfig(r=2))
    assert adapted_names(model) == {"q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"}


def test_an_unknown_target_is_refused_with_the_list_of_the_real_ones() -> None:
    with pytest.raises(AdapterError) as caught:
        prepare(quantized_model(), LoraConfig(target_modules=["q_proj", "query"]))
    assert caught.value.found == ["query"]
    assert set(caught.value.allowed) >= LLAMA_LINEARS


def test_part_of_a_name_is_no_target() -> None:
    with pytest.raises(AdapterError, match="does not have"):
        prepare(quantized_model(), LoraConfig(target_modules=["proj"]))


@pytest.mark.parametrize("pattern", [r"model\.layers\.9\..*", "q_proj"])
def test_a_pattern_that_matches_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(AdapterError, match="regular expression over whole names"):
        prepare(quantized_model(), LoraConfig(target_modules=pattern))


def test_a_pattern_that_is_no_regular_expression_is_refused() -> None:
    with pytest.raises(AdapterError, match="no regular expression"):
        prepare(quantized_model(), LoraConfig(target_modules="*.q_proj"))


def test_dora_with_an_initialisation_that_changes_the_base_is_refused() -> None:
    with pytest.raises(AdapterError, match="DoRA"):
        prepare(quantized_model(), LoraConfig(use_dora=True, init_lora_weights="pissa"))


@pytest.mark.parametrize(
    "options",
    [{}, {"use_dora": True}, {"lora_bias": True}, {"use_rslora": True}],
    ids=["lora", "dora", "bias", "rslora"],
)
def test_saved_adapter_has_pefts_keys_and_answers_equally_in_plain_peft(
    options: dict[str, Any], tmp_path: Path
) -> None:
    config = LoraConfig(r=4, lora_alpha=12, task_type="CAUSAL_LM", target_modules=sorted(LLAMA_LINEARS), **options)
    base = quantized_model()
    twin = dense_twin(base)
    model = randomise(prepare(base, config)).eval()
    model.save_pretrained(tmp_path / "ours")
    get_peft_model(dense_twin(quantized_model()), config).save_pretrained(tmp_path / "peft")

    ours = load_file(tmp_path / "ours" / "adapter_model.safetensors")
    pefts = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert {name: value.shape for name, value in ours.items()} == {name: value.shape for name, value in pefts.items()}

    plain = PeftModel.from_pretrained(twin, tmp_path / "ours").eval()
    torch.testing.assert_close(logits(plain), logits(model), rtol=1e-4, atol=1e-5)


def test_saved_adapter_answers_equally_over_the_bitsandbytes_model(original: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    model = load_model(original, quantization=FourfoldConfig(), dtype=torch.float32, device="cpu")
    model = randomise(prepare(model, LoraConfig(r=4, task_type="CAUSAL_LM"))).eval()
    model.save_pretrained(tmp_path / "adapter")
    reference = AutoModelForCausalLM.from_pretrained(
        original,
        quantization_config=BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
        dtype=torch.float32,
        device_map="cpu",
    )
    # In eval mode bitsandbytes repacks its weights on the CPU and computes in bf16.
    reference = PeftModel.from_pretrained(reference, tmp_path / "adapter").train()
    torch.testing.assert_close(logits(reference), logits(model), rtol=1e-3, atol=1e-4)


def test_adapter_of_plain_peft_loads_and_answers_equally(tmp_path: Path) -> None:
    base = quantized_model()
    plain = randomise(get_peft_model(dense_twin(base), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))).eval()
    plain.save_pretrained(tmp_path)
    loaded = load_adapter(base, tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(plain), rtol=1e-4, atol=1e-5)
    assert not [name for name, parameter in loaded.named_parameters() if parameter.requires_grad]


def test_a_loaded_adapter_can_be_trained_on(tmp_path: Path) -> None:
    randomise(prepare(quantized_model(), LoraConfig(r=4))).save_pretrained(tmp_path)
    model = load_adapter(quantized_model(), tmp_path, is_trainable=True)
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    assert gradients
    assert all(gradient is not None and gradient.dtype == torch.float32 for gradient in gradients)


@pytest.mark.parametrize(("method", "iterations"), [("pissa", 1), ("pissa_niter_2", 1), ("loftq", 1), ("loftq", 2)])
def test_adapter_of_a_decomposition_and_its_saved_base_answer_equally_in_plain_peft(
    method: str, iterations: int, original: Path, tmp_path: Path
) -> None:
    model = load_model(original, quantization=FourfoldConfig(), dtype=torch.float32, device="cpu")
    config = LoraConfig(r=4, task_type="CAUSAL_LM")
    model = prepare(model, config, init_lora_weights=method, original=original, loftq_iterations=iterations).eval()
    wanted = logits(model)
    model.save_pretrained(tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["init_lora_weights"] is True
    model.unload().save_pretrained(tmp_path / "base")

    base = load_model(tmp_path / "base", dtype=torch.float32, device="cpu")
    plain = PeftModel.from_pretrained(dense_twin(base), tmp_path / "adapter").eval()
    torch.testing.assert_close(logits(plain), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(load_adapter(base, tmp_path / "adapter").eval()), wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    prepare(quantized_model(), LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_folder_without_an_adapter_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        load_adapter(quantized_model(), tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="an empty folder"):
        load_adapter(quantized_model(), tmp_path)


def test_an_adapters_configuration_without_its_weights_is_refused(saved: Path) -> None:
    (saved / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is missing"):
        load_adapter(quantized_model(), saved)


def test_a_pickled_adapter_is_refused(saved: Path) -> None:
    shutil.move(saved / "adapter_model.safetensors", saved / "adapter_model.bin")
    with pytest.raises(CheckpointError, match="is a pickle"):
        load_adapter(quantized_model(), saved)


def test_an_adapter_file_that_was_cut_short_is_refused(saved: Path) -> None:
    whole = (saved / "adapter_model.safetensors").read_bytes()
    (saved / "adapter_model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(CheckpointError, match=r"adapter_model\.safetensors is cut short"):
        load_adapter(quantized_model(), saved)


def test_an_adapter_for_another_base_is_refused_with_both_names(saved: Path) -> None:
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=96
    )
    smaller = LlamaForCausalLM(config)
    smaller.config.name_or_path = "smaller"
    path = saved / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "larger"}))
    with pytest.raises(AdapterError, match=r"belongs to another base(.|\n)*larger in its configuration, and smaller"):
        load_adapter(quantize_model(smaller), saved)


def test_a_half_written_adapter_configuration_is_refused(saved: Path) -> None:
    text = (saved / "adapter_config.json").read_text()
    (saved / "adapter_config.json").write_text(text[: len(text) // 2])
    with pytest.raises(CheckpointError, match=r"adapter_config\.json cannot be read"):
        load_adapter(quantized_model(), saved)


def test_an_unconverted_pissa_adapter_of_plain_peft_is_refused(saved: Path) -> None:
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps({**config, "init_lora_weights": "pissa"}))
    with pytest.raises(AdapterError, match="path_initial_model_for_weight_conversion"):
        load_adapter(quantized_model(), saved)


def test_an_adapter_beside_another_answers_as_it_does_alone_and_leaves_that_as_it_was(tmp_path: Path) -> None:
    """Over quantized layers, on which it has layers that the first one does not."""
    folders = {}
    for seed, (name, targets) in enumerate({"one": ["q_proj"], "two": ["q_proj", "up_proj"]}.items()):
        torch.manual_seed(seed)
        made = prepare(quantized_model(), LoraConfig(r=2 + seed, target_modules=targets, task_type="CAUSAL_LM"))
        randomise(made)
        made.save_pretrained(tmp_path / name)
        folders[name] = tmp_path / name
    alone = {name: logits(load_adapter(quantized_model(), folder)) for name, folder in folders.items()}
    model = load_adapter(quantized_model(), folders["one"])
    add_adapter(model, folders["two"], "two")
    assert model.active_adapter == "default"
    assert torch.equal(logits(model), alone["one"])
    model.set_adapter("two")
    assert torch.equal(logits(model), alone["two"])
    assert not torch.equal(alone["one"], alone["two"])
    assert adapted_names(model) == {"q_proj", "up_proj"}
