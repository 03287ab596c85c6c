"""Error and size of the number formats on normal weights, as the table of docs/formats.md.

python benchmarks/formats.py             prints the table
python benchmarks/formats.py --write     puts it into docs/formats.md, with versions and date
"""

from __future__ import annotations

import argparse
import datetime
import math
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

import fourfold
from fourfold.quantization.calibration import CALIBRATIONS
from fourfold.quantization.formats import FORMATS
from fourfold.quantization.tensor import quantize

DOCS = Path(__file__).parents[1] / "docs" / "formats.md"
BEGIN, END = "<!-- table: begin -->\n", "<!-- table: end -->\n"
BLOCK_SIZES = (32, 64, 128, 256, 1024, 4096)
SHAPE = (1024, 1024)


def measured(weights: torch.Tensor, name: str, block_size: int, double_quant: bool, calibration: str) -> str:
    """One row: relative error ||dequantized - w|| / ||w||, signal-to-noise ratio, bits a weight."""
    quantized = quantize(weights, name, block_size, double_quant, calibration=calibration)
    exact = weights.double()
    error = float((quantized.dequantize().double() - exact).norm() / exact.norm())
    bits = 8 * quantized.num_bytes / quantized.num_elements
    case = [name, block_size, "yes" if double_quant else "no", calibration]
    numbers = [f"{error:.4f}", f"{-20 * math.log10(error):.1f}", f"{bits:.3f}"]
    return "| " + " | ".join(map(str, case + numbers)) + " |\n"


def table() -> str:
    """The table, in Markdown; the same at each call."""
    weights = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))
    return "".join(_lines(weights))


def _lines(weights: torch.Tensor) -> Iterator[str]:
    yield "| format | block size | double quantization | calibration | relative error | SNR (dB) | bits a weight |\n"
    yield "|---|---:|---|---|---:|---:|---:|\n"
    for name in FORMATS:
        for block_size in BLOCK_SIZES:
            for double_quant in (True, False):
                yield measured(weights, name, block_size, double_quant, "absmax")
    for name, number_format in FORMATS.items():
        for calibration in CALIBRATIONS:
            if number_format.is_integer and calibration != "absmax":
                yield measured(weights, name, 64, True, calibration)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/formats.md")
    text = table()
    if not parser.parse_args().write:
        print(text, end="")
        return
    before, _, rest = DOCS.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    made = (
        f"Made by `python benchmarks/formats.py --write` on {datetime.date.today()}: "
        f"fourfold {fourfold.__version__}, torch {torch.__version__}, {platform.machine()}.\n\n"
    )
    DOCS.write_text(before + BEGIN + made + text + END + after)


if __name__ == "__main__":
    main()
