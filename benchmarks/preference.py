"""DPO on real preference pairs: solutions of GSM8K's questions by language models, right ones before wrong ones.

    python benchmarks/preference.py --model FOLDER --solutions gsm8k-model-solutions.jsonl

A pair is a right and a wrong solution of one question, both by fine-tuned models; whole questions are held out. With
`--chosen ground_truth` the right solution is the data set's own, which differs from the models' in style as well. With
`--supervised gsm8k-train.jsonl` the model first learns to solve other questions, and what was learned is merged: the
order in which preferences are usually trained. Adds its record to benchmarks/results/preference.json. Claims checked:
reward accuracy on held-out pairs above 70%, and peak memory below 1.6 times that of supervised fine-tuning at the same
shape, which is both measured as as many sequences in a microbatch (two to a pair) and as as many rows.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import shlex
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import torch

from fourfold import pipeline
from fourfold.config import load_config
from fourfold.training.run_folder import installed_versions

ACCURACY, MEMORY = 0.70, 1.6
SOLVERS = ("6b_finetuning", "6b_verification", "175b_finetuning", "175b_verification")
RESULTS = Path(__file__).parent / "results" / "preference.json"


def pairs_of(record: dict[str, Any], chosen: str) -> list[dict[str, str]]:
    """All pairs of a right and a wrong solution of one question, each text once."""
    solutions = [record[solver] for solver in SOLVERS]
    right = {one["solution"].strip() for one in solutions if one["is_correct"]}
    wrong = {one["solution"].strip() for one in solutions if not one["is_correct"]} - right
    if chosen == "ground_truth":
        right = {record["ground_truth"].strip()}
    return [
        {"prompt": record["question"], "chosen": good, "rejected": bad}
        for good, bad in product(sorted(right), sorted(wrong))
        if good and bad
    ]


def write_pairs(args: argparse.Namespace, folder: Path) -> dict[str, int]:
    """train.jsonl and held_out.jsonl, of different questions, shuffled."""
    records = [json.loads(line) for line in args.solutions.read_text(encoding="utf-8").splitlines()]
    random.Random(args.seed).shuffle(records)
    parts = {"held_out": records[: args.held_out], "train": records[args.held_out :]}
    counts = {}
    for name, part in parts.items():
        rows = [pair for record in part for pair in pairs_of(record, args.chosen)]
        random.Random(args.seed).shuffle(rows)
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        counts[f"{name}_pairs"] = len(rows)
    return counts


def supervised(args: argparse.Namespace, folder: Path) -> str:
    """A model that has learned the data set's own solutions of other questions, written as the pairs' are."""
    text = args.supervised.read_text(encoding="utf-8").replace("#### ", "A: ")
    (folder / "solutions.jsonl").write_text(text, encoding="utf-8")
    keys = {
        "train_dataset": folder / "solutions.jsonl",
        "columns": "{prompt: question, completion: answer}",
        "row_format": "prompt_completion",
        "learning_rate": args.supervised_learning_rate,
        "num_train_epochs": args.supervised_epochs,
        "per_device_train_batch_size": args.batch,
    }
    run(args, folder, "supervised", **keys)
    merged = folder / "supervised-model"
    pipeline.merge(str(folder / "supervised"), merged)
    return str(merged)


def run(args: argparse.Namespace, folder: Path, name: str, **keys: Any) -> dict[str, Any]:
    overrides = {
        "model_name_or_path": args.model,
        "train_dataset": folder / "train.jsonl",
        "max_length": args.max_length,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "learning_rate": args.learning_rate,
        "lora_r": args.rank,
        "lora_alpha": 2 * args.rank,
        "target_modules": "all-linear",
        "optim": "adamw",
        "seed": args.seed,
        "output_dir": folder / name,
    } | keys
    if torch.cuda.is_available():
        # One policy for all: the plan would give each run what it has room for.
        overrides |= {"recompute": args.recompute, "cuda_graphs": False}
        torch.cuda.empty_cache()
    return pipeline.train(load_config(None, [f"--{key}={value}" for key, value in overrides.items()]), "plain").metrics


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--solutions", type=Path, required=True)
    parser.add_argument("--chosen", choices=("model", "ground_truth"), default="model")
    parser.add_argument("--held-out", type=int, default=200, help="questions")
    parser.add_argument("--batch", type=int, default=16, help="pairs in a microbatch, which is a step")
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--memory-steps", type=int, default=20, help="of the runs whose memory is compared; 0: none")
    parser.add_argument("--max-length", type=int, default=384)
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--beta", type=float, default=0.1)
    parser.add_argument("--loss-type", default="sigmoid")
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--recompute", default="none")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--supervised", type=Path, help="questions and answers that are learned first")
    parser.add_argument("--supervised-epochs", type=float, default=1)
    parser.add_argument("--supervised-learning-rate", type=float, default=5e-4)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    dpo = {"method": "dpo", "beta": args.beta, "loss_type": args.loss_type, "per_device_train_batch_size": args.batch}
    sft = {"columns": "{prompt: prompt, completion: chosen}", "row_format": "prompt_completion"}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        counts = write_pairs(args, folder)
        if args.supervised is not None:
            args.model = supervised(args, folder)
        held_out = {"eval_dataset": folder / "held_out.jsonl", "per_device_eval_batch_size": args.batch}
        learned = run(args, folder, "preferences", num_train_epochs=args.epochs, **dpo, **held_out)
        compared = {
            "dpo": dpo,
            "sft_as_many_sequences": {**sft, "per_device_train_batch_size": 2 * args.batch},
            "sft_as_many_rows": {**sft, "per_device_train_batch_size": args.batch},
        }
        peaks = {
            name: run(args, folder, f"short_{name}", **keys, max_steps=args.memory_steps)
            for name, keys in (compared.items() if args.memory_steps else ())
        }
    memory = {name: metrics["memory_peak_bytes"] for name, metrics in peaks.items()}
    ratios = {name: memory["dpo"] / size for name, size in memory.items() if name != "dpo"}
    kept = ("eval_rewards/accuracies", "eval_rewards/margins", "eval_loss", "train_loss", "train_seconds")
    record = {
        "command": shlex.join(["python", "benchmarks/preference.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "versions": installed_versions(),
        "pairs": counts,
        "dpo": {name: learned[name] for name in kept if name in learned},
        "memory_peak_bytes": memory,
        "dpo_memory_over_sft": ratios,
        "accuracy_holds": learned["eval_rewards/accuracies"] > ACCURACY,
        # Off GPUs the peak is the process's, which no later run lowers.
        "memory_holds": {name: ratio < MEMORY for name, ratio in ratios.items()} if torch.cuda.is_available() else None,
    }
    records = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps([*records, record], indent=2) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=2))


if __name__ == "__main__":
    main()
