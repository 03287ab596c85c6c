from __future__ import annotations

import json
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from datasets import disable_progress_bars
from peft import PeftModel
from safetensors.torch import load_file

from fourfold import exporting, pipeline
from fourfold.errors import CheckpointError, ConfigError, SaveError, VerificationError
from fourfold.export import merging
from fourfold.inference import generate_replies


@pytest.fixture(scope="module")
def run(tiny_run, tmp_path_factory) -> Iterator[Path]:
    """A finished run in NF4, shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    disable_progress_bars()
    config = tiny_run(tmp_path_factory.mktemp("merging"), save_steps=4)
    yield pipeline.train(config, progress="silent").output_dir
    torch.set_num_threads(before)


def test_merged_weights_are_the_dequantized_ones_plus_the_adapter_in_plain_arithmetic(run, tmp_path) -> None:
    report = pipeline.merge(str(run), tmp_path / "merged")
    assert report.dtype == "bfloat16"
    assert report.difference.relative_error < report.bound == merging.DEFAULT_BOUND
    session = pipeline.chat(str(run))
    layer = session.model.base_model.model.model.layers[0].mlp.down_proj
    base = layer.get_base_layer().quantized.dequantize(torch.float32).double()
    expected = base + 8 / 4 * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    written = load_file(tmp_path / "merged" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(written, expected.to(torch.bfloat16))


def test_merged_model_answers_as_the_adapter_does_in_plain_transformers(run, tmp_path) -> None:
    pipeline.merge(str(run), tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    session = pipeline.chat(str(run), max_new_tokens=8)
    question = [{"role": "user", "content": "Emil paid 4 euros."}]
    theirs = generate_replies(merged, tokenizer, [question], session.options)
    assert (
        theirs
        == ["".join(session.reply(question))]
        == ["".join(pipeline.chat(str(tmp_path / "merged"), max_new_tokens=8).reply(question))]
    )
    assert theirs != [""]


def test_merging_onto_the_original_weights_is_another_model_and_says_how_far(run, tmp_path) -> None:
    with pytest.raises(
        VerificationError, match=r"onto the original weights.*nothing was written(.|\n)*relative error"
    ) as fault:
        pipeline.merge(str(run), tmp_path / "merged", onto="original")
    assert "merge onto the dequantized weights" in str(fault.value)
    assert list(tmp_path.iterdir()) == []
    report = pipeline.merge(str(run), tmp_path / "merged", onto="original", bound=0.9)
    assert 0.02 < report.difference.relative_error < 0.9
    assert any("original" in line for line in report.lines())
    record = json.loads((tmp_path / "merged" / "verification.json").read_text())
    assert record["bounds"] == {"kl": None, "top1": 0.0, "relative_error": 0.9}


@pytest.mark.parametrize("wrong", ["one layer is left out", "scaling is off by a tenth", "one matrix is noisy"])
def test_a_wrong_merge_is_caught_and_nothing_is_written(run, tmp_path, monkeypatch, wrong) -> None:
    merge = merging.merge_adapter

    def broken(model: PeftModel, dtype: torch.dtype) -> transformers.PreTrainedModel:
        layers = [module for module in model.modules() if hasattr(module, "lora_B")]
        if wrong == "one layer is left out":
            layers[3].lora_B["default"].weight.data.zero_()
        if wrong == "scaling is off by a tenth":
            for layer in layers:
                layer.scaling["default"] *= 1.1
        merged = merge(model, dtype)
        if wrong == "one matrix is noisy":
            weight = merged.model.layers[1].mlp.down_proj.weight.data
            weight += 0.3 * weight.std() * torch.randn_like(weight)
        return merged

    monkeypatch.setattr(merging, "merge_adapter", broken)
    with pytest.raises(VerificationError, match="dequantized weights does not answer as the trained model"):
        pipeline.merge(str(run), tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


def test_what_was_compared_stands_beside_the_model_as_beside_an_export(run, tmp_path) -> None:
    report = pipeline.merge(str(run), tmp_path / "merged")
    exporting.export(str(run), tmp_path / "exported", "safetensors")
    ours, theirs = (json.loads((tmp_path / name / "verification.json").read_text()) for name in ("merged", "exported"))
    assert ours.keys() == theirs.keys()
    assert ours["bounds"] == {"kl": 2e-3, "top1": 0.95, "relative_error": 0.02}
    assert theirs["bounds"].keys() < ours["bounds"].keys()
    (reading,), (other,) = ours["readers"].values(), theirs["readers"].values()
    assert reading.keys() == other.keys()
    assert reading["agreement"].keys() == other["agreement"].keys()
    assert reading["agreement"]["mean_kl"] == report.difference.mean_kl <= 2e-3
    assert reading["checks"].keys() - {"relative_error"} == other["checks"].keys()
    files = [file for file in (tmp_path / "merged").iterdir() if file.name != "verification.json"]
    assert ours["num_bytes"] == sum(file.stat().st_size for file in files)
    assert str(tmp_path) not in json.dumps(ours)
    settings = transformers.GenerationConfig.from_pretrained(tmp_path / "merged")
    assert settings.eos_token_id == reading["checks"]["stop_tokens"] == other["checks"]["stop_tokens"]


@pytest.mark.parametrize(
    ("bound", "said"), [({"bound_kl": 1e-12}, "mean KL of at most 1e-12"), ({"bound_top1": 1.1}, "110")]
)
def test_each_bound_fails_the_command_and_nothing_is_written(run, tmp_path, bound, said) -> None:
    with pytest.raises(VerificationError, match=rf"dequantized weights does not answer(.|\n)*{said}"):
        pipeline.merge(str(run), tmp_path / "merged", **bound)
    assert list(tmp_path.iterdir()) == []


def test_the_adapters_folder_serves_as_well_as_the_runs(run, tmp_path) -> None:
    pipeline.merge(str(run / "adapter"), tmp_path / "merged")
    assert (tmp_path / "merged" / "chat_template.jinja").is_file()


def test_a_folder_that_is_not_free_and_an_unknown_base_are_refused(run, tmp_path) -> None:
    (tmp_path / "mine").write_text("mine")
    for out, said in ((tmp_path, "is not empty"), (tmp_path / "mine", "is a file")):
        with pytest.raises(CheckpointError, match=said):
            pipeline.merge(str(run), out)
    with pytest.raises(ConfigError, match=r"elsewhere(.|\n)*dequantized, original"):
        pipeline.merge(str(run), tmp_path / "merged", onto="elsewhere")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_a_full_disk_while_merging_or_quantizing_leaves_nothing_behind(run, tiny_run, tmp_path) -> None:
    config = tiny_run(tmp_path)
    kept = {path.name for path in tmp_path.iterdir()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A limit on the size of a file makes every writer fail as a full disk does.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(SaveError, match=r"The disk is full: .*merged"):
            pipeline.merge(str(run), tmp_path / "merged")
        with pytest.raises(SaveError, match=r"The disk is full: .*nf4"):
            pipeline.quantize_checkpoint(config, tmp_path / "nf4")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {path.name for path in tmp_path.iterdir()} == kept
