"""How far each export of a run is from the trained model: KL, likeliest tokens and size, on real text.

    python benchmarks/export.py --run RUN --text wikitext2-test.txt

The run is one of the quickstart's task, of a few steps (`docs/numbers.md` has the command). Each export is written by
the same code as `fourfold export`, read back by its readers, and deleted. Of the text the first 1,024 tokens count, in
windows of 256. The numbers go into `benchmarks/results/export.json`.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

from fourfold.environment import gather
from fourfold.export.targets import EXPORTS, export_model
from fourfold.exporting import load_trained
from fourfold.inputs import find_run

WINDOW, NUM_WINDOWS = 256, 4
RESULTS = Path(__file__).parent / "results" / "export.json"
# The first ones first: after each, the record is written.
ROWS = [
    ("gguf", "F16"),
    ("gguf", "Q8_0"),
    ("gguf", "Q4_0"),
    ("safetensors", None),
    ("bnb-4bit", "nf4"),
    ("adapter", None),
    ("gguf", "Q5_0"),
    ("gguf", "Q4_1"),
    ("gguf", "BF16"),
    ("gguf", "Q5_1"),
    ("bnb-4bit", "fp4"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True)
    parser.add_argument("--text", type=Path, required=True)
    words = parser.parse_args()
    trained = load_trained(find_run(words.run))
    text = words.text.read_text(encoding="utf-8")[: 10 * WINDOW * NUM_WINDOWS]
    ids = trained.tokenizer(text)["input_ids"]
    windows = [ids[start : start + WINDOW] for start in range(0, WINDOW * NUM_WINDOWS, WINDOW)]
    trained = replace(trained, prompts=windows)
    rows = []
    for target, quantization in ROWS:
        with tempfile.TemporaryDirectory() as folder:
            started = time.monotonic()
            # Measured is what there is: no bound is to stop it.
            report = export_model(trained, Path(folder) / "out", target, quantization, bound_kl=1e9, bound_top1=0)
        bounds = EXPORTS[target].quantizations[quantization or next(iter(EXPORTS[target].quantizations))]
        readers = {name: asdict(reading.agreement) for name, reading in report.readings.items()}
        row = {
            "format": target,
            "quantization": quantization,
            "num_bytes": report.num_bytes,
            "bounds": asdict(bounds),
            "seconds": round(time.monotonic() - started, 1),
            "readers": readers,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
        record = {
            "date": datetime.date.today().isoformat(),
            "text": f"{words.text.name}, the first {WINDOW * NUM_WINDOWS} tokens in windows of {WINDOW}",
            "processor": gather().cpu,
            "versions": gather().versions,
            "exports": rows,
        }
        RESULTS.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
