"""The benchmark with the peers runs on a CPU, too, and finds losses that do not agree."""

from __future__ import annotations

import importlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def load(name: str, monkeypatch: pytest.MonkeyPatch):
    for folder in (ROOT / "benchmarks" / "peers", ROOT / "benchmarks"):
        monkeypatch.syspath_prepend(str(folder))
    return importlib.import_module(name)


def test_fourfold_and_peft_learn_the_same_and_what_is_not_installed_is_reported(
    tiny_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "tiny").symlink_to(tiny_llama)
    words = ["--quick", "--settings", "tiny-2x32", "--models", tmp_path, "--steps", "2", "--no-floor"]
    words += ["--systems", "fourfold", "peft-bnb", "unsloth", "--json", tmp_path / "out.json", "--profile", tmp_path]
    answer = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "end_to_end.py", *words],
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr
    result = json.loads((tmp_path / "out.json").read_text())["results"]["tiny-2x32"]
    ours, theirs, absent = (result["systems"][name][0] for name in ("fourfold", "peft-bnb", "unsloth"))
    assert absent["status"] == "skipped"
    assert "skipped: unsloth: No module named" in answer.stdout
    assert ours["num_alike"] == theirs["num_alike"] == 2 * 7
    assert ours["num_trainable"] == theirs["num_trainable"]
    # In fp32, after five steps of learning.
    assert ours["losses"][0] - ours["losses"][-1] > 1e-3
    torch.testing.assert_close(ours["losses"], theirs["losses"], rtol=1e-5, atol=1e-5)
    assert "launches" in (tmp_path / "tiny-2x32-none.fourfold.txt").read_text()


def test_losses_that_are_further_apart_than_rounding_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    find = load("end_to_end", monkeypatch).disagreements
    assert find({}) == []
    assert find({"a": [12.5, 12.0]}) == []
    assert find({"a": [12.5, 12.0], "b": [12.5015, 12.02]}) == []
    (first,) = find({"a": [12.5, 12.0], "b": [12.503, 12.0]})
    assert first.startswith("step 1: the losses of [a] and [b] differ by 0.003")
    (later,) = find({"a": [12.5, 12.0], "b": [12.5, 12.03], "c": [12.5, 12.0]})
    assert later.startswith("step 2: the losses of [a] and [b]")
    assert len(find({"a": [12.5, math.nan], "b": [12.5, math.nan]})) == 2
    assert len(find({"a": [math.nan]})) == 1


def test_a_process_that_fails_or_never_ends_is_reported_with_its_last_words(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run_process = load("end_to_end", monkeypatch).run_process
    failed = run_process(["-c", "raise ValueError('no such model')"], [], 60, tmp_path)
    assert failed["status"] == "failed"
    assert "no such model" in failed["reason"]
    endless = run_process(["-c", "import time; time.sleep(60)"], [], 0.2, tmp_path)
    assert (endless["status"], "still running" in endless["reason"]) == ("failed", True)


def test_every_setting_names_a_shape_and_a_policy_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from fourfold.models.recomputation import POLICIES
    from fourfold.training.bench import SHAPES

    end_to_end, floor, systems, worker = (
        load(name, monkeypatch) for name in ("end_to_end", "floor", "systems", "worker")
    )
    for setting in end_to_end.SETTINGS.values():
        assert setting.shape in SHAPES
        assert setting.policy in POLICIES
    assert {policy.removesuffix("_offload") for policy in POLICIES} <= set(floor.KINDS)
    assert set(end_to_end.SYSTEMS) <= set(systems.SYSTEMS) == set(worker.PACKAGES)


def test_the_floor_counts_the_products_that_a_policy_computes_again(
    monkeypatch: pytest.MonkeyPatch, tiny_llama: Path
) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    floor = load("floor", monkeypatch)
    config = json.loads((tiny_llama / "config.json").read_text())
    step = floor.Step(config, 1, 16, "cpu", torch.float32)

    def products(kind: str) -> int:
        """Of matrices alone: attention is counted differently on every device."""
        with FlopCounterMode(display=False) as counter:
            step.run(kind)
        return counter.get_flop_counts()["Global"][torch.ops.aten.mm]

    hidden, inner, kv, layers, tokens = 64, 128, 32, 2, 16
    linear = {"q": hidden * hidden, "k": hidden * kv, "v": hidden * kv, "o": hidden * hidden}
    linear |= dict.fromkeys(("gate", "up", "down"), hidden * inner)
    head = hidden * config["vocab_size"]
    once = sum(linear.values())
    for kind, again in (("none", 0), ("full", once - linear["down"]), ("all", once), ("mlp", 2 * hidden * inner)):
        assert products(kind) == 2 * tokens * (layers * (2 * once + again) + 2 * head)


def test_loss_curves_overlap_if_the_paths_are_no_further_apart_than_two_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    loss_curves = load("loss_curves", monkeypatch)

    def overlap(*curves: list[float]) -> bool:
        return loss_curves.verdict(dict(zip(loss_curves.RUNS, curves, strict=True)))["overlap"]

    generic = [3.0 - step / 100 for step in range(50)]
    another = [3.0, *(loss + 0.01 for loss in generic[1:])]
    assert overlap(generic, generic, another)
    assert overlap(generic, [3.0, *(loss - 0.005 for loss in generic[1:])], another)
    assert not overlap(generic, [3.0, *(loss + 0.02 for loss in generic[1:])], another)
    assert not overlap(generic, [loss + 0.005 for loss in generic], another)
    assert not overlap(generic, [*generic[:-1], math.nan], another)
