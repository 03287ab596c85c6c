"""`fourfold train --num_processes N` becomes torchrun."""

from __future__ import annotations

import sys

from typer.testing import CliRunner

from fourfold.cli import app, launching


def test_train_on_several_gpus_becomes_torchrun_with_the_same_words(monkeypatch, tmp_path):
    (tmp_path / "run.yaml").write_text("model_name_or_path: m\n")
    became: list[list[str]] = []
    monkeypatch.setattr(launching.os, "execv", lambda path, words: became.append(words) or sys.exit(0))
    monkeypatch.delenv("RANK", raising=False)
    words = ["train", str(tmp_path / "run.yaml"), "--num_processes", "2", "--learning_rate", "1e-4", "--json"]
    assert CliRunner().invoke(app, words).exit_code == 0
    (command,) = became
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]
    assert command[command.index("--nproc-per-node") + 1] == "2"
    started = command[command.index("fourfold") + 1 :]
    assert started == ["train", str(tmp_path / "run.yaml"), "--learning_rate", "1e-4", "--json"]


def test_processes_are_not_started_twice(monkeypatch, tmp_path):
    (tmp_path / "run.yaml").write_text("model_name_or_path: m\n")
    monkeypatch.setenv("RANK", "0")
    result = CliRunner().invoke(app, ["train", str(tmp_path / "run.yaml"), "--num_processes", "2"])
    assert result.exit_code == 2
    assert "the processes are started already" in result.stderr
