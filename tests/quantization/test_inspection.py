from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from fourfold.errors import CheckpointError, QuantizationError
from fourfold.quantization.hf_config import FourfoldConfig
from fourfold.quantization.inspection import NUM_BINS, inspect_checkpoint, inspect_weights
from fourfold.quantization.linear import QuantizedLinear
from fourfold.quantization.tensor import quantize


@pytest.mark.parametrize("format", ["nf4", "fp4", "int4", "int8"])
@pytest.mark.parametrize("shape", [(48, 64), (7, 33), (3, 16, 32)])
def test_errors_equal_float64_arithmetic(format: str, shape: tuple[int, ...]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    row = inspect_weights([("w", weight)], format).layers[0]
    quantized = quantize(weight, format)
    error = quantized.dequantize(torch.float32).double() - weight.double()
    relative = float(error.norm() / weight.double().norm())
    assert row.relative_error == pytest.approx(relative, rel=1e-5)
    assert row.snr_db == pytest.approx(-20 * math.log10(relative), abs=1e-4)
    assert row.max_abs_error == pytest.approx(float(error.abs().max()), rel=1e-6)
    assert row.bits_per_weight == 8 * quantized.num_bytes / weight.numel()


def test_total_joins_signal_and_noise_of_all_layers() -> None:
    weights = {"a": torch.randn(32, 64), "b": 10 * torch.randn(16, 64).bfloat16()}
    total = inspect_weights(weights.items()).total
    noise = sum(
        float((quantize(w).dequantize(torch.float32).double() - w.double()).square().sum()) for w in weights.values()
    )
    signal = sum(float(w.double().square().sum()) for w in weights.values())
    assert total.relative_error == pytest.approx(math.sqrt(noise / signal), rel=1e-5)
    assert total.num_elements == 48 * 64


def test_histogram_counts_weights_in_units_of_their_blocks_absmax() -> None:
    weight = torch.randn(5, 77)
    inspection = inspect_weights([("w", weight)], double_quant=False)
    assert inspection.histogram is not None
    expected = [0] * NUM_BINS
    flat = weight.flatten().tolist()
    for start in range(0, len(flat), 64):
        block = flat[start : start + 64]
        scale = max(map(abs, block))
        for value in block:
            expected[min(int((value / scale + 1) / 2 * NUM_BINS), NUM_BINS - 1)] += 1
    counts = inspection.histogram.counts
    assert sum(counts) == len(flat)
    # A weight on the edge of two bins may fall to either side in fp32.
    assert sum(abs(a - b) for a, b in zip(counts, expected, strict=True)) <= 4


def test_exact_weights_have_no_error_and_no_snr() -> None:
    row = inspect_weights([("zeros", torch.zeros(4, 64))]).layers[0]
    assert (row.relative_error, row.snr_db, row.max_abs_error) == (0.0, None, 0.0)


def test_nan_is_refused_with_the_tensors_name() -> None:
    with pytest.raises(QuantizationError, match=r"layer\.weight"):
        inspect_weights([("layer.weight", torch.full((4, 4), torch.nan))])


def test_lines_fit_100_columns_and_mark_every_code_point() -> None:
    inspection = inspect_weights([("model.layers.10." + "x" * 60, torch.randn(64, 640))])
    lines = inspection.lines()
    assert max(map(len, lines)) <= 100
    assert next(line for line in lines if "┴" in line).count("┴") == 16
    assert any("1 tensors" in line for line in lines)


def test_picture_is_a_png(tmp_path: Path) -> None:
    inspect_weights([("w", torch.randn(64, 64))], "int8").save_picture(tmp_path / "weights.png")
    assert (tmp_path / "weights.png").read_bytes().startswith(b"\x89PNG")


def test_inspection_is_plain_json() -> None:
    text = json.dumps(inspect_weights([("w", torch.randn(8, 64))]).to_dict(), allow_nan=False)
    assert json.loads(text)["layers"][0]["bits_per_weight"] > 4


def test_checkpoint_rows_are_the_layers_that_loading_quantizes(tiny_llama: Path) -> None:
    config = FourfoldConfig(modules_to_not_convert=["model.layers.1.mlp"])
    inspection = inspect_checkpoint(tiny_llama, config)
    loaded = AutoModelForCausalLM.from_pretrained(
        tiny_llama, quantization_config=FourfoldConfig(modules_to_not_convert=["model.layers.1.mlp"])
    )
    quantized = {f"{n}.weight": m.quantized for n, m in loaded.named_modules() if isinstance(m, QuantizedLinear)}
    assert {row.name for row in inspection.layers} == set(quantized)
    assert inspection.total.num_bytes == sum(tensor.num_bytes for tensor in quantized.values())
    assert config.modules_to_not_convert == ["model.layers.1.mlp"]


def test_transposed_weights_are_measured_as_the_model_holds_them(tmp_path: Path) -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16))
    model.save_pretrained(tmp_path)
    rows = {row.name: row for row in inspect_checkpoint(tmp_path).layers}
    assert rows["transformer.h.0.attn.c_attn.weight"].shape == (96, 32)


def test_experts_stored_one_by_one_are_measured_once_each(tmp_path: Path) -> None:
    config = MixtralConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
        num_local_experts=2,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    rows = [row for row in inspect_checkpoint(tmp_path).layers if ".experts." in row.name]
    assert sum(row.num_elements for row in rows) == 2 * 3 * 32 * 64
    assert len({row.name for row in rows}) == len(rows)


@pytest.mark.parametrize("format", ["nf4", "int8"])
def test_quantized_checkpoint_shows_bits_but_no_error(tiny_llama: Path, tmp_path: Path, format: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, quantization_config=FourfoldConfig(format))
    model.save_pretrained(tmp_path)
    inspection = inspect_checkpoint(tmp_path)
    assert inspection.total.format == format
    assert inspection.total.num_bytes == inspect_checkpoint(tiny_llama, FourfoldConfig(format)).total.num_bytes
    assert inspection.total.relative_error is None
    assert "cannot be known" in inspection.lines()[-1]
    with pytest.raises(CheckpointError, match="no histogram"):
        inspection.save_picture(tmp_path / "x.png")


def test_damaged_checkpoints_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        inspect_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())
    with pytest.raises(CheckpointError, match="no weights"):
        inspect_checkpoint(tmp_path)
    whole = (tiny_llama / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        inspect_checkpoint(tmp_path)


def test_checkpoint_that_lacks_a_weight_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(tiny_llama / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((tiny_llama / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"lacks weights[\s\S]*up_proj"):
        inspect_checkpoint(tmp_path)
