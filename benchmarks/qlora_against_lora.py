"""QLoRA against 16-bit LoRA on GSM8K: same seed, data, steps and adapter; only the base differs.

    python benchmarks/qlora_against_lora.py --model FOLDER --gsm8k gsm8k-train.jsonl [--steps 80]

Writes benchmarks/results/qlora_against_lora.json and prints the table. The claim checked: the final validation loss of
QLoRA (NF4, double quantization) is within 2% of that of LoRA over the 16-bit base.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any

from fourfold import pipeline
from fourfold.config import load_config
from fourfold.training.run_folder import installed_versions

BOUND = 0.02
RESULTS = Path(__file__).parent / "results" / "qlora_against_lora.json"


def final_loss(args: argparse.Namespace, folder: Path, *, load_in_4bit: bool) -> dict[str, Any]:
    rows = args.gsm8k.read_text(encoding="utf-8").splitlines()
    train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
    train.write_text("\n".join(rows[: args.steps * args.batch]), encoding="utf-8")
    held_out.write_text("\n".join(rows[-args.held_out :]), encoding="utf-8")
    overrides = {
        "model_name_or_path": args.model,
        "load_in_4bit": load_in_4bit,
        "train_dataset": train,
        "eval_dataset": held_out,
        "columns": "{prompt: question, completion: answer}",
        "row_format": "prompt_completion",
        "max_length": 512,
        "per_device_train_batch_size": args.batch,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "num_train_epochs": 1,
        "learning_rate": 5e-4,
        "lora_r": 16,
        "lora_alpha": 32,
        "seed": args.seed,
        "output_dir": folder / ("qlora" if load_in_4bit else "lora"),
    }
    config = load_config(None, [f"--{key}={value}" for key, value in overrides.items()])
    run = pipeline.train(config, "plain")
    return {key: run.metrics[key] for key in ("eval_loss", "train_loss", "train_seconds", "memory_peak_bytes")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--held-out", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "lora": final_loss(args, Path(folder), load_in_4bit=False),
            "qlora": final_loss(args, Path(folder), load_in_4bit=True),
        }
    difference = results["qlora"]["eval_loss"] / results["lora"]["eval_loss"] - 1
    record = {
        "command": shlex.join(["python", "benchmarks/qlora_against_lora.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": installed_versions(),
        "steps": args.steps,
        "batch": args.batch,
        "results": results,
        "relative_difference": difference,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")
    print(f"{'base':8} {'validation loss':>16} {'training loss':>14} {'seconds':>8}")
    for name, result in results.items():
        print(f"{name:8} {result['eval_loss']:16.4f} {result['train_loss']:14.4f} {result['train_seconds']:8.0f}")
    print(f"QLoRA's validation loss is {difference:+.2%} of LoRA's (bound {BOUND:.0%})")
    sys.exit(abs(difference) > BOUND)


if __name__ == "__main__":
    main()
