"""`fourfold bench`, and the measuring under it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig
from typer.testing import CliRunner

from fourfold.cli import app
from fourfold.cli.verbs import Shape
from fourfold.errors import ConfigError
from fourfold.models.preparing import prepare
from fourfold.models.recomputation import POLICIES
from fourfold.quantization.hf_config import FourfoldConfig
from fourfold.quantization.linear import QuantizedLinear
from fourfold.training import bench as measuring

CPU = torch.device("cpu")
TINY = ["bench", "--shape", "tiny", "--batch", "2", "--seq", "16", "--steps", "2", "--device", "cpu"]


def invoke(*words: str):
    return CliRunner().invoke(app, list(words))


def tiny(**options):
    model = measuring.random_model("tiny", FourfoldConfig(), torch.float32, CPU)
    return prepare(model, LoraConfig(r=4, task_type="CAUSAL_LM"), **options)


def test_bench_prints_a_json_object_with_a_row_for_each_way() -> None:
    result = invoke(*TINY, "--json", "--lora_r", "4")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert (report["batch"], report["seq"], report["device"], report["fused"]) == (2, 16, "CPU", False)
    assert report["copy_bytes_per_second"] > 1e8
    assert report["matmul_flops_per_second"] > 1e8
    assert [row["recompute"] for row in report["rows"]] == ["none", "full"]
    for row in report["rows"]:
        assert row["error"] is None
        assert math.isclose(row["tokens_per_second"] * row["seconds_per_step"], 2 * 16)
        assert row["peak_memory_bytes"] > 2**20


def test_bench_measures_the_model_of_a_configuration(tiny_llama: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model_name_or_path: {tiny_llama}\nmax_length: 16\nper_device_train_batch_size: 3\ndevice: cpu\n"
    )
    result = invoke("bench", str(config), "--steps", "1")
    assert result.exit_code == 0, result.output
    assert "generic path, 3 x 16 tokens a step" in result.stdout
    assert "recompute" in result.stdout


def test_a_shape_beside_a_configuration_is_refused(tmp_path: Path) -> None:
    result = invoke("bench", str(tmp_path / "run.yaml"), "--shape", "tiny")
    assert result.exit_code == 2
    assert "not both" in result.stderr


def test_neither_a_shape_nor_a_model_is_a_fault_of_the_configuration() -> None:
    result = invoke("bench")
    assert result.exit_code == 2
    assert "model_name_or_path" in result.stderr


def test_the_command_knows_the_shapes_there_are() -> None:
    assert {shape.value for shape in Shape} == set(measuring.SHAPES)
    with pytest.raises(ConfigError, match="unknown shape"):
        measuring.shape_config("9b")


def test_a_random_model_is_quantized_and_its_head_is_not() -> None:
    model = measuring.random_model("tiny", FourfoldConfig(), torch.bfloat16, CPU)
    assert sum(isinstance(module, QuantizedLinear) for module in model.modules()) == 2 * 7
    assert model.lm_head.weight.dtype == torch.bfloat16


def test_a_random_model_has_as_many_parameters_as_the_model_its_shape_is_named_after() -> None:
    from transformers import LlamaForCausalLM

    for shape, published in (("8b", 8_030_261_248), ("1b", 1_235_814_400)):
        with torch.device("meta"):
            model = LlamaForCausalLM(measuring.shape_config(shape))
        assert model.num_parameters() == published


def test_fused_blocks_are_measured_under_every_policy() -> None:
    model = tiny(fused=True)
    report = measuring.bench(model, batch=1, seq=8, steps=1)
    assert report.fused
    assert [row.recompute for row in report.rows] == list(POLICIES)
    assert all(row.error is None for row in report.rows)


def test_a_way_that_runs_out_of_memory_says_so_and_the_others_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny()
    step, calls = measuring._step, []

    def step_without_room(*args):
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        step(*args)

    monkeypatch.setattr(measuring, "_step", step_without_room)
    report = measuring.bench(model, batch=1, seq=8, steps=1)
    first, second = report.rows
    assert (first.error, first.seconds_per_step) == ("out of memory", None)
    assert second.error is None
    assert any("out of memory" in line for line in report.lines())


def test_no_room_for_a_random_model_is_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(measuring, "quantize_model", no_room)
    result = invoke(*TINY)
    assert result.exit_code == 1
    assert "choose a smaller shape" in result.stderr


@pytest.mark.parametrize("wrong", [{"batch": 0}, {"seq": 1}, {"steps": 0}])
def test_numbers_out_of_range_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="out of range"):
        measuring.bench(tiny(), **{"batch": 1, "seq": 8, "steps": 1, **wrong})
