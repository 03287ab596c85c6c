"""`torchrun -m fourfold train`: a whole run of two processes, and one whose second process is killed."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fourfold.config import RunConfig

LAUNCH = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("kills", [False, True])
def test_a_run_of_two_leaves_one_run_folder_and_ends_when_one_process_is_killed(tiny_run, tmp_path, kills):
    config: RunConfig = tiny_run(tmp_path, distributed="fsdp2", max_steps=100_000 if kills else 4, logging_steps=1)
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    log = tmp_path / "log.txt"
    with log.open("w") as file:
        command = [*LAUNCH, "-m", "fourfold", "train", str(tmp_path / "run.yaml")]
        run = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=ENVIRONMENT)
        try:
            if kills:
                deadline = time.monotonic() + 120
                while "step 2/" not in log.read_text():
                    assert time.monotonic() < deadline, log.read_text()
                    time.sleep(0.1)
                killed = time.monotonic()
                os.kill(_process_of_rank(run.pid, 1), signal.SIGKILL)
                code = run.wait(timeout=60)
                assert time.monotonic() - killed < 60
            else:
                code = run.wait(timeout=120)
        finally:
            run.kill()
    text = log.read_text()
    if kills:
        assert code != 0
        # Whoever is first to say so: the process that is left, or torchrun.
        assert re.search(r"rank 1 on \S+ has died|rank\s+: 1 ", text)
        return
    assert code == 0, text
    # The main process alone tells and writes.
    assert text.count("step 4/4  loss") == 1
    assert text.count("The run lies in") == 1
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) > 4


def _process_of_rank(launcher: int, rank: int) -> int:
    """torchrun's child whose environment says so."""
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            words = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if parent == launcher and f"RANK={rank}".encode() in words:
            return int(folder.name)
    raise AssertionError(f"torchrun {launcher} has no process of rank {rank}")
