"""How long planning takes: the optimizer, microbatches, policies and their mixtures, strategies of several GPUs.

    python benchmarks/planning.py [--json FILE]

Everything from the model's configuration on, for 8B and 70B shapes, with `optim`, `recompute` and `distributed` left to
the plan. Times are those of one CPU core, on which planning is all of the time. Shown is the first of three, for which
nothing of the setting was known. No GPU is used.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from fourfold.config import RunConfig
from fourfold.planning import plan

GIB = 2**30
SHAPES: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
# Shape, rows of a step and GPU, tokens of a row, GPUs, GiB of host memory.
SETTINGS: list[tuple[str, int, int, str, int | None]] = [
    ("8b", 16, 2048, "24GB", None),
    ("8b", 1, 131072, "24GB", 24),
    ("70b", 16, 2048, "48GB", None),
    ("70b", 16, 2048, "80GB", None),
    ("70b", 64, 512, "H200", None),
    ("70b", 16, 32768, "H200", 128),
    ("70b", 4, 2048, "4xRTX 4090", None),
    ("70b", 6, 4096, "8xH200", None),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    print(f"{'setting':<32}{'seconds':>8}{'tried':>7}  chosen")
    with tempfile.TemporaryDirectory() as folder:
        for name, widths in SHAPES.items():
            LlamaConfig(**widths, num_key_value_heads=8, vocab_size=128256).save_pretrained(Path(folder) / name)
        for shape, num_rows, seq, gpus, host in SETTINGS:
            config = RunConfig(
                model_name_or_path=str(Path(folder) / shape),
                train_dataset="rows.jsonl",
                max_length=seq,
                per_device_train_batch_size=num_rows,
                gradient_accumulation_steps=1,
            )
            seconds = []
            for _ in range(3):
                start = time.process_time()
                made = plan(config, gpus, None if host is None else host * GIB)
                seconds.append(time.process_time() - start)
            told = made.lines()
            chosen = "nothing fits" if made.chosen is None else told[1].strip()
            setting = f"{shape} {num_rows}x{seq} {gpus}"
            print(f"{setting:<32}{seconds[0]:>8.2f}{made.num_tried:>7}  {chosen}", flush=True)
            rows.append({"setting": setting, "host_gib": host, "seconds": seconds, **made.to_dict()})
    if args.json is not None:
        args.json.write_text(json.dumps({"command": f"python benchmarks/planning.py --json {args.json}", "rows": rows}))


if __name__ == "__main__":
    main()
