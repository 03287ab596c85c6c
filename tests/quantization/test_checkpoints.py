"""Whole checkpoints: streamed in, written, read again, and exchanged with Transformers + bitsandbytes."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from fourfold import FourfoldConfig, load_model
from fourfold.errors import CheckpointError, QuantizationError
from fourfold.quantization.linear import QuantizedLinear
from fourfold.quantization.tensor import quantize

VARIANTS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama in bf16 whose rows are no multiple of a block, and whose head is its own."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=72,
            intermediate_size=130,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=98,
            tie_word_embeddings=False,
        )
    ).to(torch.bfloat16)
    folder = tmp_path_factory.mktemp("untied")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tied(untied: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = LlamaForCausalLM.from_pretrained(untied)
    model.config.tie_word_embeddings = True
    model = LlamaForCausalLM(model.config).to(torch.bfloat16)
    folder = tmp_path_factory.mktemp("tied")
    model.save_pretrained(folder)
    return folder


def load_quantized(folder: Path, **options: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=FourfoldConfig(**options), dtype=torch.bfloat16
    )


def ours_dense(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: module.quantized.dequantize(torch.bfloat16)
        for name, module in model.named_modules()
        if isinstance(module, QuantizedLinear)
    }


def theirs_dense(model: nn.Module) -> dict[str, Tensor]:
    """What bitsandbytes makes of each weight, taken as one row: some row lengths its AVX-512 path (0.49) gets wrong."""
    dense = {}
    for name, module in model.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = copy.copy(module.weight.quant_state)
            state.shape = torch.Size((1, state.shape.numel()))
            flat = bnb.functional.dequantize_4bit(module.weight.data, state)
            dense[name] = flat.reshape(module.weight.quant_state.shape)
    return dense


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        # Adding zero: bitsandbytes has two signs for the zero of FP4's code 8, depending on the place in the row.
        assert torch.equal((tensor + 0.0).view(torch.int16), (theirs[name] + 0.0).view(torch.int16)), name


def weights(folder: Path) -> dict[str, Tensor]:
    return {key: value for file in folder.glob("*.safetensors") for key, value in load_file(file).items()}


def test_linear_layers_become_quantized_and_the_rest_stays(untied: Path) -> None:
    model = load_quantized(untied)
    dense = weights(untied)
    assert type(model.lm_head) is nn.Linear
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16
    quantized = [name for name, module in model.named_modules() if isinstance(module, QuantizedLinear)]
    assert len(quantized) == 14
    for name in quantized:
        expected = quantize(dense[f"{name}.weight"]).dequantize()
        assert torch.equal(model.get_submodule(name).quantized.dequantize(), expected)
    assert torch.equal(model.lm_head.weight, dense["lm_head.weight"])


@pytest.mark.parametrize(("name", "double_quant"), VARIANTS)
def test_what_we_write_loads_in_transformers_with_bitsandbytes(
    untied: Path, tmp_path: Path, name: str, double_quant: bool
) -> None:
    ours = load_quantized(untied, bnb_4bit_quant_type=name, bnb_4bit_use_double_quant=double_quant)
    ours.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant_method"] == "bitsandbytes"
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert_same(ours_dense(ours), theirs_dense(theirs))


@pytest.mark.parametrize(("name", "double_quant"), VARIANTS)
def test_what_bitsandbytes_writes_loads_here_and_is_written_back_unchanged(
    untied: Path, tmp_path: Path, name: str, double_quant: bool
) -> None:
    entry = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=name, bnb_4bit_use_double_quant=double_quant)
    theirs = AutoModelForCausalLM.from_pretrained(untied, quantization_config=entry, dtype=torch.bfloat16)
    expected = theirs_dense(theirs)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load_model(tmp_path / "theirs", dtype=torch.bfloat16, device="cpu")
    assert_same(ours_dense(ours), expected)
    ours.save_pretrained(tmp_path / "again")
    before, after = weights(tmp_path / "theirs"), weights(tmp_path / "again")
    assert before.keys() == after.keys()
    for key, value in before.items():
        assert value.dtype == after[key].dtype, key
        assert torch.equal(value, after[key]), key


def test_a_checkpoint_of_bitsandbytes_loads_without_it(untied: Path, tmp_path: Path) -> None:
    entry = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    theirs = AutoModelForCausalLM.from_pretrained(untied, quantization_config=entry, dtype=torch.bfloat16)
    expected = theirs_dense(theirs)
    theirs.save_pretrained(tmp_path)
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, tmp_path / "expected.bin")
    program = """
import importlib.abc, importlib.util, sys
class Blocked(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "bitsandbytes":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
import torch
from safetensors.torch import load_file
from fourfold import QuantizedLinear, load_model
folder = sys.argv[1]
model = load_model(folder, dtype=torch.bfloat16, device="cpu")
expected = load_file(folder + "/expected.bin")
layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, QuantizedLinear)}
assert layers.keys() == expected.keys()
for name, layer in layers.items():
    assert torch.equal(layer.quantized.dequantize(torch.bfloat16), expected[name]), name
assert "bitsandbytes" not in sys.modules
print(len(layers))
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "14"


@pytest.mark.parametrize("name", ["nf4", "fp4", "int4", "int8"])
def test_a_sharded_checkpoint_is_read_written_and_read_again(untied: Path, tmp_path: Path, name: str) -> None:
    dense = AutoModelForCausalLM.from_pretrained(untied, dtype=torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense", max_shard_size="40KB")
    assert len(list((tmp_path / "dense").glob("*.safetensors"))) > 2
    model = load_quantized(tmp_path / "dense", bnb_4bit_quant_type=name, bnb_4bit_blocksize=128)
    assert_same(ours_dense(model), ours_dense(load_quantized(untied, bnb_4bit_quant_type=name, bnb_4bit_blocksize=128)))
    # Small shards part the codes of a weight from its scales.
    model.save_pretrained(tmp_path / "quantized", max_shard_size="3KB")
    again = load_model(tmp_path / "quantized", dtype=torch.bfloat16, device="cpu")
    assert_same(ours_dense(again), ours_dense(model))
    ids = torch.arange(8)[None]
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_output_head_is_quantized_when_asked(untied: Path, tmp_path: Path) -> None:
    model = load_quantized(untied, quantize_lm_head=True)
    assert isinstance(model.lm_head, QuantizedLinear)
    model.save_pretrained(tmp_path)
    assert_same(ours_dense(load_model(tmp_path, dtype=torch.bfloat16, device="cpu")), ours_dense(model))
    assert_same(ours_dense(model), theirs_dense(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)))


def test_a_head_tied_to_the_embedding_is_not_quantized(tied: Path) -> None:
    with pytest.raises(QuantizationError, match="lm_head shares its weight with the embedding"):
        load_quantized(tied, quantize_lm_head=True)
    model = load_quantized(tied)
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.mark.parametrize(
    ("pattern", "num_left"),
    [
        ("q_proj", 2),
        ("layers.0.mlp", 3),
        ("model.layers.1.*", 7),
        ("*.down_proj", 2),
        ("model.layers.0.mlp.up_proj", 1),
    ],
)
def test_modules_are_skipped_by_name_part_of_path_and_glob(
    untied: Path, tmp_path: Path, pattern: str, num_left: int
) -> None:
    model = load_quantized(untied, modules_to_not_convert=[pattern])
    left = [name for name, module in model.named_modules() if type(module) is nn.Linear]
    assert len(left) == num_left + 1
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 14 - num_left
    model.save_pretrained(tmp_path)
    assert_same(ours_dense(load_model(tmp_path, dtype=torch.bfloat16, device="cpu")), ours_dense(model))
    assert_same(ours_dense(model), theirs_dense(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)))


def test_a_pattern_that_matches_nothing_is_refused(untied: Path) -> None:
    with pytest.raises(QuantizationError, match=r"modules_to_not_convert(.|\n)*attn_q(.|\n)*q_proj"):
        load_quantized(untied, modules_to_not_convert=["attn_q", "k_proj"])


def test_a_configuration_serves_several_models_unchanged(untied: Path) -> None:
    config = FourfoldConfig(modules_to_not_convert=["layers.0"])
    before = dict(vars(config))
    for _ in range(2):
        AutoModelForCausalLM.from_pretrained(untied, quantization_config=config)
    assert vars(config) == before


def test_transposed_layers_of_gpt2_are_quantized_and_exchanged(tmp_path: Path) -> None:
    torch.manual_seed(0)
    dense = GPT2LMHeadModel(GPT2Config(n_embd=72, n_layer=2, n_head=4, vocab_size=98, n_positions=32)).eval()
    dense.save_pretrained(tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense", quantization_config=FourfoldConfig(bnb_4bit_quant_type="int8"), dtype=torch.float32
    )
    ids = torch.arange(8)[None]
    torch.testing.assert_close(model(ids).logits, dense(ids).logits, rtol=0, atol=0.01)
    model = load_quantized(tmp_path / "dense")
    assert model.transformer.h[0].attn.c_attn.quantized.shape == (216, 72)
    model.save_pretrained(tmp_path / "quantized")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "quantized", dtype=torch.bfloat16)
    assert_same(ours_dense(model), theirs_dense(theirs))
    assert_same(ours_dense(load_model(tmp_path / "quantized", dtype=torch.bfloat16, device="cpu")), ours_dense(model))


def test_dequantize_gives_an_ordinary_model(untied: Path) -> None:
    model = load_quantized(untied)
    expected = ours_dense(model)
    plain = model.dequantize()
    assert not any(isinstance(module, QuantizedLinear) for module in plain.modules())
    assert all(torch.equal(plain.get_submodule(name).weight, tensor) for name, tensor in expected.items())


def test_nan_in_a_weight_is_refused_by_its_name(untied: Path, tmp_path: Path) -> None:
    shutil.copytree(untied, tmp_path, dirs_exist_ok=True)
    state = load_file(tmp_path / "model.safetensors")
    state["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(QuantizationError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds values"):
        load_quantized(tmp_path)


@pytest.fixture
def quantized(untied: Path, tmp_path: Path) -> Path:
    load_quantized(untied).save_pretrained(tmp_path)
    return tmp_path


LAYER = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("suffix", "message"),
    [
        (".quant_state.bitsandbytes__nf4", "model.layers.1.mlp.up_proj.weight has no quantization state"),
        (".absmax", "model.layers.1.mlp.up_proj.weight.absmax is missing"),
        (".nested_absmax", "model.layers.1.mlp.up_proj.weight.nested_absmax is missing"),
        (".quant_map", "model.layers.1.mlp.up_proj.weight.quant_map is missing"),
        ("", "model.layers.1.mlp.up_proj.weight is missing"),
    ],
)
def test_an_entry_that_is_missing_is_refused_by_its_key(quantized: Path, suffix: str, message: str) -> None:
    state = load_file(quantized / "model.safetensors")
    del state[LAYER + suffix]
    save_file(state, quantized / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=message.replace(".", r"\.")):
        load_model(quantized, device="cpu")


def test_codes_of_another_shape_are_refused_by_their_key(quantized: Path) -> None:
    state = load_file(quantized / "model.safetensors")
    state[LAYER] = state[LAYER][:-7].contiguous()
    save_file(state, quantized / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight is cut short"):
        load_model(quantized, device="cpu")


def test_a_damaged_state_is_refused_by_its_key(quantized: Path) -> None:
    key = LAYER + ".quant_state.bitsandbytes__nf4"
    state = load_file(quantized / "model.safetensors")
    state[key] = state[key][:-9].contiguous()
    save_file(state, quantized / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"up_proj\.weight\.quant_state\.bitsandbytes__nf4 is no JSON object"):
        load_model(quantized, device="cpu")


@pytest.mark.parametrize("is_quantized", [False, True])
def test_a_weight_that_is_missing_altogether_is_refused(
    untied: Path, quantized: Path, tmp_path: Path, is_quantized: bool
) -> None:
    folder = quantized
    if not is_quantized:
        shutil.copytree(untied, tmp_path, dirs_exist_ok=True)
    state = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in state.items() if not key.startswith(LAYER)}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing(.|\n)*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(folder, quantization=FourfoldConfig(), device="cpu")


@pytest.mark.parametrize(
    "entry",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_has_fp16_weight": True},
    ],
)
def test_other_methods_are_refused(quantized: Path, entry: dict[str, object]) -> None:
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = entry
    (quantized / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=str(entry["quant_method"])):
        load_model(quantized, device="cpu")


def test_smollm2_takes_at_most_4_13_bits_a_weight(smollm2_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2_path, quantization_config=FourfoldConfig())
    held = [module.quantized for module in model.modules() if isinstance(module, QuantizedLinear)]
    num_weights = sum(tensor.num_elements for tensor in held)
    assert num_weights == 106_168_320
    assert 8 * sum(tensor.num_bytes for tensor in held) / num_weights <= 4.13
