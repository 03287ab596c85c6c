from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from twins import tokens

from fourfold.errors import CheckpointError, QuantizationError
from fourfold.models.loading import default_device, default_dtype, load_model, load_tokenizer
from fourfold.quantization.hf_config import FourfoldConfig
from fourfold.quantization.linear import QuantizedLinear


@pytest.fixture
def checkpoint(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def change_config(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_everything_that_is_not_quantized_is_held_and_computed_in_the_asked_dtype(
    tiny_llama: Path, dtype: torch.dtype
) -> None:
    model = load_model(tiny_llama, quantization=FourfoldConfig(), dtype=dtype, device="cpu")
    assert {p.dtype for p in model.parameters()} == {dtype, torch.uint8}
    with torch.no_grad():
        logits = model(input_ids=tokens()).logits
    assert logits.dtype == dtype
    assert logits.isfinite().all()
    assert model.lm_head.weight.dtype == dtype


def test_without_quantization_the_model_is_transformers_own(tiny_llama: Path) -> None:
    model = load_model(tiny_llama, device="cpu", dtype=torch.float32)
    assert not [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    stored = load_file(tiny_llama / "model.safetensors")
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, stored["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_a_quantized_checkpoint_loads_with_the_same_answers(tiny_llama: Path, tmp_path: Path, format: str) -> None:
    model = load_model(tiny_llama, quantization=FourfoldConfig(format), dtype=torch.float32, device="cpu")
    model.save_pretrained(tmp_path)
    again = load_model(tmp_path, quantization=FourfoldConfig("fp4"), dtype=torch.float32, device="cpu")
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens()).logits, model(input_ids=tokens()).logits)


def test_shards_load(tiny_llama: Path, tmp_path: Path) -> None:
    whole = load_model(tiny_llama, dtype=torch.float32, device="cpu")
    whole.save_pretrained(tmp_path, max_shard_size="50KB")
    sharded = load_model(tmp_path, dtype=torch.float32, device="cpu")
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), sharded.parameters(), strict=True))


def write_gguf(model: PreTrainedModel, path: Path) -> None:
    """The file that llama.cpp's converter writes of a Llama in fp32, without the tokenizer."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        num_heads = heads.get(name.split(".")[-2])
        if num_heads is not None:
            # llama.cpp rotates neighbouring elements, Transformers the two halves of a head.
            tensor = tensor.view(num_heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_loads_with_the_same_answers_and_can_be_quantized(tiny_llama: Path, tmp_path: Path) -> None:
    source = load_model(tiny_llama, dtype=torch.float32, device="cpu")
    write_gguf(source, tmp_path / "tiny.gguf")
    dense = load_model(tmp_path / "tiny.gguf", dtype=torch.float32, device="cpu")
    quantized = load_model(tmp_path / "tiny.gguf", quantization=FourfoldConfig(), dtype=torch.float32, device="cpu")
    wanted = load_model(tiny_llama, quantization=FourfoldConfig(), dtype=torch.float32, device="cpu")
    with torch.no_grad():
        torch.testing.assert_close(dense(input_ids=tokens()).logits, source(input_ids=tokens()).logits)
        torch.testing.assert_close(quantized(input_ids=tokens()).logits, wanted(input_ids=tokens()).logits)


def test_a_missing_gguf_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        load_model(tmp_path / "none.gguf")


@pytest.mark.parametrize(
    "entry",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "bitsandbytes", "load_in_8bit": True, "llm_int8_has_fp16_weight": True},
    ],
)
def test_another_quantization_method_is_refused_by_name(checkpoint: Path, entry: dict[str, Any]) -> None:
    change_config(checkpoint, quantization_config=entry)
    with pytest.raises(CheckpointError, match=entry["quant_method"]):
        load_model(checkpoint)


@pytest.mark.parametrize("value", ["abc", 2.5, None])
def test_a_config_value_of_a_wrong_type_is_refused_by_key(checkpoint: Path, value: object) -> None:
    change_config(checkpoint, num_hidden_layers=value)
    with pytest.raises(CheckpointError, match=r"config\.json[\s\S]*num_hidden_layers"):
        load_model(checkpoint)


def test_an_unknown_model_type_is_refused_by_name(checkpoint: Path) -> None:
    change_config(checkpoint, model_type="llamma")
    with pytest.raises(CheckpointError, match="llamma"):
        load_model(checkpoint)


@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_weight_that_is_missing_is_refused_by_name_and_not_filled_with_random_numbers(
    checkpoint: Path, key: str
) -> None:
    change_weights(checkpoint, lambda tensors: tensors.pop(key))
    with pytest.raises(CheckpointError, match=rf"lacks weights[\s\S]*{key}"):
        load_model(checkpoint, device="cpu")


@pytest.mark.parametrize("quantization", [None, FourfoldConfig()], ids=["16-bit", "4-bit"])
@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_weight_of_another_shape_is_refused_by_name(
    checkpoint: Path, key: str, quantization: FourfoldConfig | None
) -> None:
    change_weights(checkpoint, lambda tensors: tensors.update({key: torch.zeros(3, 5)}))
    with pytest.raises(CheckpointError, match=rf"{key}: \(3, 5\)"):
        load_model(checkpoint, quantization=quantization, device="cpu")


@pytest.mark.parametrize("quantization", [None, FourfoldConfig()], ids=["16-bit", "4-bit"])
@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_refused_by_name(
    checkpoint: Path, key: str, value: float, quantization: FourfoldConfig | None
) -> None:
    change_weights(checkpoint, lambda tensors: tensors[key].view(-1)[5:6].fill_(value))
    with pytest.raises((CheckpointError, QuantizationError), match=rf"{key}[\s\S]*not finite"):
        load_model(checkpoint, quantization=quantization, device="cpu")


def test_a_folder_without_a_tokenizer_is_refused(checkpoint: Path) -> None:
    for file in checkpoint.glob("*token*"):
        file.unlink()
    with pytest.raises(CheckpointError, match="no tokenizer"):
        load_tokenizer(checkpoint)


def test_the_tokenizer_beside_a_checkpoint_loads(tiny_llama: Path) -> None:
    tokenizer = load_tokenizer(tiny_llama)
    assert tokenizer.decode(tokenizer("Paid 3 euros")["input_ids"]) == "Paid 3 euros"


def test_default_device_is_the_gpu_where_there_is_one() -> None:
    assert default_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


def test_default_dtype_is_one_the_device_computes_in() -> None:
    assert default_dtype(torch.device("cpu")) in (torch.bfloat16, torch.float32)
