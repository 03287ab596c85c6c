from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from datasets import disable_progress_bars
from peft import PeftModel
from safetensors.torch import load_file

from fourfold import exporting, pipeline
from fourfold.errors import CheckpointError, ConfigError, VerificationError
from fourfold.export import gguf_model, llama_cpp, to_safetensors
from fourfold.export.targets import EXPORTS
from fourfold.models.loading import load_model


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory) -> Iterator[Path]:
    """A finished run in NF4, shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    disable_progress_bars()
    config = tiny_run(tmp_path_factory.mktemp("exporting"), save_steps=4)
    yield pipeline.train(config, progress="silent").output_dir
    torch.set_num_threads(before)


def record(out: Path) -> dict:
    return json.loads((out / "verification.json").read_text())


@pytest.mark.parametrize("quantization", ["F16", "Q8_0", "Q4_0"])
def test_a_gguf_file_is_read_by_transformers_and_by_llama_cpp_and_predicts_what_was_trained(
    run, tmp_path, quantization
) -> None:
    out = tmp_path / "out"
    report = exporting.export(str(run), out, "gguf", quantization)
    found = record(out)
    readers = {"transformers", *(["llama.cpp"] if llama_cpp.is_installed() else [])}
    assert set(found["readers"]) == set(report.readings) == readers
    for reading in found["readers"].values():
        agreement = reading["agreement"]
        assert agreement["mean_kl"] <= found["bounds"]["kl"]
        assert agreement["top1_agreement"] >= found["bounds"]["top1"]
        assert reading["checks"]["tokenizer"]["same"]
    assert sorted(path.name for path in out.iterdir()) == ["Modelfile", "model.gguf", "verification.json"]
    assert str(tmp_path) not in (out / "verification.json").read_text()


def test_merged_safetensors_in_several_shards_are_the_model_that_merge_writes(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(to_safetensors, "MAX_SHARD_BYTES", 50_000)
    exporting.export(str(run), tmp_path / "out", "safetensors")
    pipeline.merge(str(run), tmp_path / "merged")
    shards = sorted((tmp_path / "out").glob("model-*.safetensors"))
    assert len(shards) > 2
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    wanted = load_file(tmp_path / "merged" / "model.safetensors")
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name], wanted[name]) for name in wanted)
    assert max(shard.stat().st_size for shard in shards) < 100_000
    assert record(tmp_path / "out")["readers"]["transformers"]["agreement"]["top1_agreement"] >= 0.995


def test_four_bits_are_read_by_bitsandbytes(run, tmp_path) -> None:
    exporting.export(str(run), tmp_path / "out", "bnb-4bit", bound_kl=9, bound_top1=0)
    assert list(record(tmp_path / "out")["readers"]) == ["transformers with bitsandbytes"]
    entry = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (entry["quant_method"], entry["bnb_4bit_quant_type"]) == ("bitsandbytes", "nf4")
    assert not list((tmp_path / "out").glob(".merged*"))


def test_the_adapter_is_a_folder_of_peft_that_names_its_base_and_its_commands(run, tmp_path, tiny_llama) -> None:
    report = exporting.export(str(run), tmp_path / "out", "adapter")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_llama)
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    vllm, sglang = report.next_steps
    assert f"vllm serve {tiny_llama} --enable-lora --lora-modules run={tmp_path / 'out'} --max-lora-rank 8" in vllm
    assert f"--lora-paths run={tmp_path / 'out'}" in sglang
    base = load_model(tiny_llama, dtype=torch.float32, device="cpu")
    PeftModel.from_pretrained(base, tmp_path / "out")


def test_an_adapter_that_the_servers_refuse_is_refused_by_name(tiny_run, tmp_path) -> None:
    config = tiny_run(tmp_path, use_dora=True, max_steps=1)
    run = pipeline.train(config, progress="silent").output_dir
    with pytest.raises(ConfigError, match=r"take no such adapter(.|\n)*use_dora: True"):
        exporting.export(str(run), tmp_path / "out", "adapter")
    assert not (tmp_path / "out").exists()
    # Merged, it is a model like any other.
    exporting.export(str(run), tmp_path / "out", "gguf")


def test_wrong_weights_are_caught_and_nothing_stands_under_the_name(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gguf_model, "_interleaved", lambda values, heads: values)
    with pytest.raises(VerificationError, match=r"gguf F16, read by transformers(.|\n)*mean KL(.|\n)*at most 0.001"):
        exporting.export(str(run), tmp_path / "out", "gguf")
    assert list(tmp_path.iterdir()) == []


def test_a_bound_given_replaces_the_quantizations_own(run, tmp_path) -> None:
    with pytest.raises(VerificationError, match=r"gguf Q4_0(.|\n)*at most 1e-07, and 99.00%"):
        exporting.export(str(run), tmp_path / "out", "gguf", "Q4_0", bound_kl=1e-7, bound_top1=0.99)
    assert list(tmp_path.iterdir()) == []


def test_what_there_is_not_is_refused_before_anything_is_loaded(run, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"onnx(.|\n)*safetensors, bnb-4bit, gguf, adapter"):
        exporting.export(str(run), tmp_path / "out", "onnx")
    with pytest.raises(ConfigError, match=r"gguf has no such quantization(.|\n)*Q4_K_M(.|\n)*F16, BF16"):
        exporting.export(str(run), tmp_path / "out", "gguf", "Q4_K_M")
    with pytest.raises(CheckpointError, match="no"):
        exporting.export(str(tmp_path), tmp_path / "out", "gguf")


def test_a_model_trained_as_a_whole_is_exported_too(tiny_run, tmp_path) -> None:
    config = tiny_run(tmp_path, adapter=None, load_in_4bit=False, max_steps=1, learning_rate=1e-4)
    run = pipeline.train(config, progress="silent").output_dir
    exporting.export(str(run), tmp_path / "out", "gguf", "F32")
    with pytest.raises(ConfigError, match="no adapter to export"):
        exporting.export(str(run), tmp_path / "adapter", "adapter")


def test_the_verbs_choices_are_the_tables() -> None:
    from fourfold.cli.exporting import Target

    assert [target.value for target in Target] == list(EXPORTS)
    assert set(EXPORTS["gguf"].quantizations) == set(gguf_model.QUANTIZATIONS)


def test_a_file_that_was_cut_short_is_named(run, tmp_path) -> None:
    exporting.export(str(run), tmp_path / "out", "gguf")
    whole = (tmp_path / "out" / "model.gguf").read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 2000, 3):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match=r"cut.gguf is (cut short|no GGUF file)"):
            load_model(tmp_path / "cut.gguf", device="cpu")
