"""benchmarks/loading.py runs on a CPU, and gives what its report says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(not hasattr(os, "preadv"), reason="this system reads no file from several threads at once")
def test_every_load_is_measured(tiny_llama: Path, tmp_path: Path) -> None:
    systems = ["fourfold", "transformers", "reading", "disk"]
    command = [sys.executable, "benchmarks/loading.py", str(tiny_llama), "--device", "cpu", "--repeats", "1"]
    subprocess.run(
        [*command, "--systems", *systems, "--json", str(tmp_path / "report.json")],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        check=True,
        timeout=300,
    )
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["bytes"] == (tiny_llama / "model.safetensors").stat().st_size
    assert [row["what"] for row in report["rows"]] == systems
    assert all(row["least"] <= row["seconds"] <= row["most"] for row in report["rows"])
