from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import zero_run
from peft import PeftModel
from safetensors.torch import load_file

pytestmark = pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is an extra")

STRATEGIES = ("ddp", "zero1", "zero2_offload", "zero3", "zero3_offload", "zero2_file")


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("zero")


@pytest.fixture(scope="module")
def one_process(out: Path) -> dict[str, Any]:
    """The same steps by one process: as many rows in each, in as many microbatches in all."""
    return zero_run.train(out, "one", "auto", gradient_accumulation_steps="4")


@pytest.fixture(scope="module")
def two_processes(out: Path) -> dict[str, Any]:
    file = out / "zero2.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 2, "overlap_comm": True}, "train_batch_size": "auto"}))
    return zero_run.launch(
        out,
        "ddp=ddp",
        "zero1=zero1",
        "zero2_offload=zero2,distributed_offload=optimizer",
        "zero3=zero3",
        "zero3_offload=zero3,distributed_offload=all,fused=no",
        f"zero2_file=zero2,deepspeed={file}",
        f"ddp_to_zero3=zero3,resume={out}/ddp/checkpoint-2",
        f"zero3_to_zero1=zero1,resume={out}/zero3/checkpoint-2",
        "in_bf16=ddp,dtype=bfloat16",
        "zero3_in_bf16=zero3,dtype=bfloat16",
        "spoiled=zero3,learning_rate=1.0e+30",
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_have_the_losses_and_norms_of_one(strategy, one_process, two_processes):
    for key in ("losses", "norms", "eval_losses"):
        assert two_processes[strategy][key] == pytest.approx(one_process[key], rel=1e-5), key


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_adapter_is_weighed_once_whoever_holds_its_parts(strategy, two_processes):
    assert two_processes[strategy]["weighed"] == {"A": [1.0], "B": [0.5]}


def test_only_zero3_parts_the_base_and_the_adapters(one_process, two_processes):
    whole = one_process["held"]
    assert two_processes["zero1"]["held"] == two_processes["zero2_offload"]["held"] == whole
    scales = 64 * 64 // 64  # a byte for each block, behind the codes
    wanted = {name: -(-(numel + (scales if "base" in name else 0)) // 2) for name, numel in whole.items()}
    assert two_processes["zero3"]["held"] == two_processes["zero3_offload"]["held"] == wanted
    # Norms and what else is small stay whole.
    assert two_processes["zero3"]["weights_bytes"] < 0.6 * two_processes["ddp"]["weights_bytes"]


@pytest.mark.parametrize("strategy", ["zero1", "zero3", "zero3_offload"])
def test_what_is_saved_is_an_ordinary_adapter(strategy, out, one_process, two_processes):
    base = zero_run.model(False, torch.float32, "cpu").unload()
    loaded = PeftModel.from_pretrained(base, out / strategy / "checkpoint-4")
    wanted = load_file(out / "one" / "checkpoint-4" / "adapter_model.safetensors")
    found = load_file(out / strategy / "checkpoint-4" / "adapter_model.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5, msg=name)
        there = loaded.get_parameter(name.replace(".weight", ".default.weight"))
        assert torch.equal(there, found[name])


@pytest.mark.parametrize("strategy", ["zero1", "zero3", "zero3_offload"])
def test_a_checkpoint_holds_what_that_of_one_process_holds(strategy, out, one_process, two_processes):
    wanted, found = (load_file(out / name / "checkpoint-2" / "optimizer.safetensors") for name in ("one", strategy))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-6, msg=name, check_dtype=False)
    records = [json.loads((out / name / "checkpoint-2" / "optimizer.json").read_text()) for name in ("one", strategy)]
    for key in ("trainable", "scheduler"):
        assert records[0][key] == records[1][key]
    assert not [file for file in (out / strategy).rglob("*") if file.suffix in (".pt", ".pth", ".bin", ".pkl")]


@pytest.mark.parametrize("strategy", ["zero2_offload", "zero3"])
def test_one_process_goes_on_where_two_stopped(strategy, out, one_process, two_processes):
    checkpoint = out / strategy / "checkpoint-2"
    went_on = zero_run.train(out, f"{strategy}_to_one", "auto", gradient_accumulation_steps="4", resume=str(checkpoint))
    for key in ("losses", "norms", "eval_losses"):
        assert went_on[key] == pytest.approx(one_process[key], rel=1e-5), key


@pytest.mark.parametrize("change", ["ddp_to_zero3", "zero3_to_zero1"])
def test_a_run_goes_on_by_another_strategy(change, one_process, two_processes):
    for key in ("losses", "norms", "eval_losses"):
        assert two_processes[change][key] == pytest.approx(one_process[key], rel=1e-5), key


def test_fp32_adapters_on_a_base_in_bf16_learn_as_with_ddp(two_processes):
    for key in ("losses", "norms"):
        assert two_processes["zero3_in_bf16"][key] == pytest.approx(two_processes["in_bf16"][key], rel=2e-3), key


def test_a_loss_that_is_not_finite_ends_the_run_on_all_processes(out, two_processes):
    everywhere = [json.loads((out / f"results-{rank}.json").read_text())["spoiled"]["error"] for rank in (0, 1)]
    assert all(
        error.startswith("TrainingError: The loss or its gradient is not finite at step 2") for error in everywhere
    )


def test_deepspeed_is_not_imported_where_it_is_not_asked_for(two_processes):
    assert not two_processes["imported"]
