"""Two processes on a CPU, by gloo, beside one: losses, weights, checkpoints, and how they end together."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

# Beside this file; the tests are imported from where they stand.
sys.path.insert(0, str(Path(__file__).parent))

import shared_run
import tiny
from transformers import AutoModelForCausalLM

from fourfold.errors import ConfigError
from fourfold.training.distributed import DISTRIBUTED, distributed_row
from fourfold.training.fsdp import Rows
from fourfold.training.processes import join, processes

pytestmark = pytest.mark.usefixtures("one_quiet_thread")


def torchrun(*words: str, processes: int = 2) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), *words]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All runs of `shared_run`: those of one process first, from whose checkpoints two go on."""
    made = tmp_path_factory.mktemp("shared")
    held_out = {"eval_dataset": tiny.rows(7, seed=5), "eval_strategy": "steps", "eval_steps": 3}
    shared_run.plain(made, "one", **held_out)
    shared_run.plain(made, "one-generic", made=shared_run.model(fused=False))
    shared_run.plain(made, "one-8bit", optim="adamw_8bit")
    shared_run.full(made, "full-one")
    script = Path(__file__).parent / "shared_run.py"
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        torchrun(str(script), str(made)), capture_output=True, text=True, env=environment, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return made


def record(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def assert_same_run(folder: Path, name: str, other: str, *, from_step: int = 0, tolerance: float = 1e-5) -> None:
    one, two = record(folder, other), record(folder, name)
    assert two["loss"][-len(one["loss"][from_step:]) :] == pytest.approx(one["loss"][from_step:], rel=tolerance)
    norms = one["grad_norm"][from_step:]
    assert two["grad_norm"][-len(norms) :] == pytest.approx(norms, rel=10 * tolerance)
    wanted = load_file(folder / f"{other}.safetensors")
    found = load_file(folder / f"{name}.safetensors")
    for key, value in wanted.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=10 * tolerance, msg=lambda text, key=key: key + text)


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_two_processes_learn_what_one_does(folder, way):
    assert_same_run(folder, way, "one")


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_an_adapter_is_weighed_once_however_many_hold_it(folder, way):
    trained, found = (load_file(folder / f"{way}{suffix}.safetensors") for suffix in ("", "-weighed"))
    for name, value in trained.items():
        assert torch.equal(found[name], value * shared_run.WEIGHT if "lora_B" in name else value), name


@pytest.mark.parametrize("rank", [0, 1])
def test_of_a_base_that_is_filled_as_it_is_sharded_a_process_holds_its_share_alone(folder, rank):
    # `held_bytes` counts parameters and scales; this is all storages that are alive.
    found = record(folder, f"filled-{rank}")
    assert found["held"] <= found["alive"] < 1.05 * found["held"]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_step_gathers_the_head_once_and_each_layer_before_the_one_behind_it_is_reduced(folder, rank):
    layers = [str(number) for number in range(2)]
    order = [tuple(each) for each in json.loads((folder / f"gathered-{rank}.json").read_text())]
    forward = [("all_gather", name) for name in ("embed_tokens", *layers, "lm_head")]
    assert order[: len(forward)] == forward
    behind = order[len(forward) :]
    assert [name for kind, name in behind if kind == "all_gather"] == layers[::-1]
    for layer, before in itertools.pairwise(layers[::-1]):
        assert behind.index(("all_gather", before)) < behind.index(("post_backward_reduce", layer))


def test_layers_of_transformers_are_sharded_with_their_checkpoints_of_activations(folder):
    assert_same_run(folder, "fsdp2-generic", "one-generic")


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_an_evaluation_counts_each_row_once(folder, way):
    # 7 rows are no whole batches of 2 processes: accelerate repeats some.
    assert record(folder, way)["eval_loss"] == pytest.approx(record(folder, "one")["eval_loss"], rel=1e-6)


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_all_weights_can_be_trained_by_two(folder, way):
    assert_same_run(folder, f"full-{way}", "full-one", tolerance=1e-4)
    whole = AutoModelForCausalLM.from_pretrained(folder / f"full-{way}" / "checkpoint-2")
    assert type(whole).__name__ == "LlamaForCausalLM"
    wanted = load_file(folder / "full-one.safetensors")
    for name, value in whole.named_parameters():
        torch.testing.assert_close(value.detach(), wanted[name], rtol=0, atol=1e-3)


@pytest.mark.parametrize("way", ["ddp", "fsdp2", "fsdp2-8bit"])
def test_a_checkpoint_of_two_is_one_processs_and_one_goes_on_from_it(folder, tmp_path, way):
    bits = {"optim": "adamw_8bit"} if "8bit" in way else {}
    reference = "one-8bit" if bits else "one"
    files = {path.name for path in (folder / reference / "checkpoint-3").iterdir()}
    found = {path.name for path in (folder / way / "checkpoint-3").iterdir()}
    assert found == files | {"rng_state_1.json", "rng_state_1.safetensors", "running_1.json"}
    plain = PeftModel.from_pretrained(tiny.base_model(), str(folder / way / "checkpoint-6"))
    assert any("lora_A" in name for name, _ in plain.named_parameters())
    ran = shared_run.trainer(tmp_path, **bits)
    ran.train(resume_from_checkpoint=folder / way / "checkpoint-3")
    shared_run.write(folder, f"{way}-to-one", ran)
    # Blocks of 8-bit state that end elsewhere in a shard are rounded once more on the way.
    assert_same_run(folder, f"{way}-to-one", reference, from_step=3, tolerance=2e-2 if bits else 1e-5)


@pytest.mark.parametrize("name", ["one-to-ddp", "one-to-fsdp2", "ddp-to-fsdp2"])
def test_two_go_on_from_anothers_checkpoint(folder, name):
    assert_same_run(folder, name, "one", from_step=3)


def test_state_of_8_bits_goes_on_in_shards(folder):
    assert_same_run(folder, "one-8bit-to-fsdp2", "one-8bit", from_step=3, tolerance=2e-2)


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_a_loss_that_is_not_finite_ends_all_and_names_the_rank(folder, way):
    first, second = (record(folder, f"spoiled-{way}-{rank}") for rank in (0, 1))
    assert first["type"] == second["type"] == "TrainingError"
    assert first["text"] == second["text"]
    assert "rank 1: microbatch" in first["text"]
    assert "rank 0:" not in first["text"]


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_a_signal_to_one_process_ends_all_after_the_same_step(folder, way):
    first, second = (record(folder, f"signal-{way}-{rank}") for rank in (0, 1))
    assert first["type"] == second["type"] == "TrainingInterrupted"
    assert first["step"] == second["step"] < shared_run.STEPS
    assert (folder / f"signal-{way}" / f"checkpoint-{first['step']}" / "manifest.json").is_file()


def test_one_process_shares_nothing():
    assert processes().count == 1
    assert all(distributed_row(name, 1) is DISTRIBUTED["ddp"] for name in ("auto", *DISTRIBUTED))
    with pytest.raises(ConfigError, match="distributed is not known"):
        distributed_row("fsdp", 2)


def test_a_gpu_that_is_named_is_refused_for_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="device names one GPU"):
        join("cuda:0", 60)
    monkeypatch.setenv("RANK", "first")
    with pytest.raises(ConfigError, match="which process this is"):
        processes()


@pytest.mark.parametrize(("counts", "width", "wanted"), [([8, 8], 4096, True), ([2, 2], 64, False), ([3, 0], 64, True)])
def test_parts_that_end_with_a_block_are_known(counts, width, wanted):
    assert Rows(counts, 0, width).end_with_blocks is wanted
