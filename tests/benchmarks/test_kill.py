"""benchmarks/kill.py in small: runs that are killed go on, and end as the one that was not."""

from __future__ import annotations

import dataclasses
import importlib.util
import multiprocessing
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kill.py"
# `fourfold train` in a process that was forked from one that has imported everything.
RUN = """
import os, sys
from pathlib import Path
log = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
os.dup2(log, 1), os.dup2(log, 2)
import datasets, torch
datasets.config.HF_DATASETS_CACHE = Path({cache!r})
torch.set_num_threads(1)
sys.argv = ["fourfold", "train", *{words!r}]
from fourfold.cli import main
main()
"""


class Forked:
    """A run with the face of `subprocess.Popen`."""

    def __init__(self, context: Any, config: Path, run: Path, *words: str) -> None:
        self.log = run.with_name(f"{run.name}.log")
        code = RUN.format(
            log=str(self.log),
            cache=str(run.with_name(f"{run.name}-cache")),
            words=[str(config), "--json", "--output_dir", str(run), *words],
        )
        self.process = context.Process(target=exec, args=(code, {}))
        self.process.start()
        self.pid = self.process.pid

    @property
    def returncode(self) -> int | None:
        code: int | None = self.process.exitcode
        return code

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> None:
        self.process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("fourfold", timeout or 0)

    def communicate(self, timeout: float | None = None) -> tuple[str, None]:
        self.wait(timeout)
        return self.log.read_text(errors="replace") if self.log.exists() else "", None


@pytest.fixture
def kill(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location("kill_benchmark", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up.
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fourfold.pipeline"])
    # Imports are to be no part of the first run's time, over which moments are drawn.
    first = context.Process(target=str)
    first.start()
    first.join()
    monkeypatch.setattr(module, "start", lambda *args: Forked(context, *args))
    return module


@pytest.mark.skipif(sys.platform != "linux", reason="processes are forked")
def test_runs_that_are_killed_end_as_the_one_that_was_not(kill: ModuleType, tmp_path: Path) -> None:
    found = list(kill.measure("packed", tmp_path / "runs", kills=3, steps=9, seed=0))
    assert len(found) == 3
    assert [made for made in found if not made.is_good] == []
    assert any(made.last_step > 0 for made in found)


def test_a_run_that_ends_otherwise_is_told(kill: ModuleType) -> None:
    good = kill.Kill("packed", "saving", 1.0, [], 3, 3, True, True, [])
    assert good.is_good
    for fault in ({"same_weights": False}, {"same_metrics": False}, {"leftovers": [".checkpoint-3.partial"]}):
        assert not dataclasses.replace(good, **fault).is_good
