"""What quantizing the base anew during training does: one run as it is, one that does so every few steps and keeps the
rest in the adapter (`requantize_every`), and one that throws the rest away.

    python benchmarks/recalibration.py --model FOLDER --gsm8k gsm8k-train.jsonl [--steps 24 --every 6 ...]

Writes benchmarks/results/recalibration.json and prints the table.
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

import torch
import transformers

from fourfold.config import load_config
from fourfold.config import options as choices
from fourfold.data import Collator
from fourfold.inputs import read_data, read_tokenizer
from fourfold.models.loading import load_model
from fourfold.models.preparing import prepare
from fourfold.training.building import build_trainer
from fourfold.training.requantizing import RequantizeCallback
from fourfold.training.run_folder import installed_versions

RESULTS = Path(__file__).parent / "results" / "recalibration.json"


def measured(args: argparse.Namespace, folder: Path, every: int | None, keeps_rest: bool) -> dict[str, Any]:
    rows = args.gsm8k.read_text(encoding="utf-8").splitlines()
    train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
    train.write_text("\n".join(rows[: args.steps * args.batch]), encoding="utf-8")
    held_out.write_text("\n".join(rows[-args.held_out :]), encoding="utf-8")
    keys = {
        "model_name_or_path": args.model,
        "bnb_4bit_quant_type": args.format,
        "train_dataset": train,
        "eval_dataset": held_out,
        "columns": "{prompt: question, completion: answer}",
        "row_format": "prompt_completion",
        "max_length": 256,
        "per_device_train_batch_size": args.batch,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "max_steps": args.steps,
        "learning_rate": args.learning_rate,
        "logging_steps": 1,
        "lora_r": args.rank,
        "lora_alpha": 2 * args.rank,
        "save_steps": args.steps * 2,
        "seed": args.seed,
        "output_dir": folder / "run",
    }
    config = load_config(None, [f"--{key}={value}" for key, value in keys.items()])
    tokenizer = read_tokenizer(config)
    train_data, eval_data = read_data(config, tokenizer)
    model = load_model(config.model_name_or_path, **choices.load_options(config, for_training=True))
    transformers.set_seed(config.seed)
    adapted = prepare(model, choices.lora_config(config))
    callbacks = [] if every is None else [RequantizeCallback(every, "absmax", lambda _: None, keeps_rest)]
    trainer = build_trainer(
        adapted,
        tokenizer,
        train_data.dataset,
        eval_data[""].dataset,
        Collator(tokenizer.pad_token_id),
        choices.training_options(config),
        callbacks,
    )
    trainer.train()
    evaluated = [log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log]
    losses = [log["loss"] for log in trainer.state.log_history if "loss" in log]
    return {"eval_loss": (evaluated or [trainer.evaluate()["eval_loss"]])[-1], "losses": losses}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--format", default="nf4")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--every", type=int, default=6)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    runs = {
        "never": (None, True),
        f"every {args.every} steps, the rest kept": (args.every, True),
        f"every {args.every} steps, the rest thrown away": (args.every, False),
    }
    results = {}
    for name, (every, keeps_rest) in runs.items():
        with tempfile.TemporaryDirectory() as folder:
            results[name] = measured(args, Path(folder), every, keeps_rest)
        print(f"{name:42} {results[name]['eval_loss']:.4f}", flush=True)
    record = {
        "command": shlex.join(["python", "benchmarks/recalibration.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": installed_versions(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "results": results,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
