"""The program for compute-sanitizer launches every kernel there is, and says so where it does not."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is for Linux")

SCRIPT = Path(__file__).with_name("sanitized.py")


@pytest.fixture(scope="module")
def sanitized() -> Any:
    spec = importlib.util.spec_from_file_location("sanitized", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_kernel_is_launched() -> None:
    report = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True)
    assert report.returncode == 0, report.stderr[-3000:]
    assert report.stdout.splitlines()[-1].startswith("all ")


def test_a_kernel_that_nothing_launches_is_named(sanitized: Any) -> None:
    with pytest.raises(SystemExit) as exit:
        sanitized.run({"norm": sanitized.norm})
    assert "swiglu_triton.swiglu_kernel" in str(exit.value)
    assert " norm_triton." not in str(exit.value)


def test_what_is_taken_for_a_kernel_is_all_that_sources_launch(sanitized: Any) -> None:
    folder = Path(sanitized.fourfold.kernels.__path__[0])
    launched = "".join(path.read_text(encoding="utf-8") for path in folder.glob("*_triton.py")).count("_kernel[(")
    assert launched == len(sanitized.kernels()) > 0
