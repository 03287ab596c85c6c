"""The table of docs/formats.md, and what it is there to show."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from fourfold.quantization.tensor import quantize

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "formats.md").read_text()


def run(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src")}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    ).stdout


def rows(text: str) -> dict[tuple[str, ...], list[float]]:
    """Rows of the table: the four that name a case, and the numbers."""
    found = re.findall(r"^\| (\w+) \| (\d+) \| (yes|no) \| (\w+) \| (.*) \|$", text, re.MULTILINE)
    return {tuple(row[:4]): [float(number) for number in row[4].split(" | ")] for row in found}


def test_the_docs_table_is_what_the_command_prints() -> None:
    printed, documented = rows(run("benchmarks/formats.py")), rows(DOCS)
    assert len(documented) == 4 * 6 * 2 + 2 * 3
    assert printed.keys() == documented.keys()
    for case, numbers in documented.items():
        # The last digit may round the other way on another machine.
        for number, other, unit in zip(numbers, printed[case], (1e-4, 0.1, 1e-3), strict=True):
            assert abs(number - other) <= 1.01 * unit, case


def test_the_docs_example_runs() -> None:
    (example,) = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    assert "4.127 bits a weight" in run("-c", example)


def test_nf4_has_the_least_relative_error_of_the_4_bit_formats_on_normal_weights() -> None:
    for seed in range(3):
        weights = torch.randn(512, 512, generator=torch.Generator().manual_seed(seed))
        for block_size in (64, 128, 256):
            error = {
                name: float((quantize(weights, name, block_size).dequantize() - weights).norm() / weights.norm())
                for name in ("nf4", "fp4", "int4")
            }
            assert error["nf4"] < min(error["fp4"], error["int4"])
