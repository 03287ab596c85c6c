"""benchmarks/memory.py runs on a CPU, and gives what its report says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_setting_is_foretold_and_trained(tmp_path: Path) -> None:
    names = [
        "tiny-2x64-selective-lora-32bit",
        "tiny-2x64-full-full-adafactor",
        "tiny-2x64-none-generic-dropout",
    ]
    done = subprocess.run(
        [sys.executable, "benchmarks/memory.py", "--settings", *names, "--json", str(tmp_path / "report.json")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert [row["name"] for row in rows] == names
    for row in rows:
        assert row["predicted_bytes"] == sum(row["parts"].values())
        assert 4 < row["loss"] < 7


def test_what_was_measured_is_still_foretold_within_3_percent() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/memory.py", "--check", "benchmarks/results/memory.json"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "8b-1x65536-mlp_offload" in done.stdout
