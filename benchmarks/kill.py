"""Runs that are killed with SIGKILL at random moments, and go on: each has to end as the run that was not killed.

    python benchmarks/kill.py [--kills 20] [--seed 0] [--variants packed unpacked] [--json FILE]

A tiny model, made on the fly, is trained by `fourfold train` on the CPU, with dropout, an evaluation every 4 steps, a
log every 2 and a checkpoint every 3. The first run of each variant is left alone. Each other one is killed once and
goes on with `--resume_from_checkpoint auto`: most at a moment drawn over the whole time from the start of the process
to its end, a third while a checkpoint, the adapter or what else is saved is written, told by the hidden folder it is
written in. Each has its own cache of tokenized rows. What is compared: the adapter's bytes, and every record of
metrics.jsonl but for times and memory; and that nothing half written is left.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fourfold.training.checkpoint import list_checkpoints
from fourfold.training.run_folder import installed_versions, read_metrics

RESULTS = Path(__file__).parent / "results" / "kill.json"
VARIANTS = {"packed": True, "unpacked": False}
# Of a log, what differs between any two runs.
MEASURED = ("_runtime", "_per_second", "_bytes")
AIMED_AT_SAVING = 1 / 3
SAVE_STEPS = 3
LIMIT_SECONDS = 600


@dataclass(frozen=True)
class Kill:
    """One run that was killed, and what became of it.

    Args:
        aim: "any moment", or "saving".
        at_seconds: When, from the start of the process.
        during: What was being written, by the hidden names that were left; empty: nothing.
        last_step: The last step in metrics.jsonl; -1 where there was no such file yet.
        resumed_from: The newest checkpoint, by step; 0 where there was none.
        same_weights, same_metrics: Whether the run that went on ended as the one that was not killed.
        leftovers: Names of what was left half written at its end.
    """

    variant: str
    aim: str
    at_seconds: float
    during: list[str]
    last_step: int
    resumed_from: int
    same_weights: bool
    same_metrics: bool
    leftovers: list[str]

    @property
    def is_good(self) -> bool:
        return self.same_weights and self.same_metrics and not self.leftovers


def make_model(folder: Path) -> Path:
    """A random Llama of two layers, and a tokenizer of bytes with a chat template."""
    alphabet = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    template = "{% for m in messages %}{{ m['role'] + ':' + m['content'] + '<end>' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<end>", chat_template=template
    )
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(tokenizer),
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def write_config(folder: Path, *, packing: bool, steps: int) -> Path:
    """The configuration of the run, with its model and its rows."""
    draw = random.Random(0)
    for name, count in (("train.jsonl", 240), ("held_out.jsonl", 8)):
        rows = []
        for _ in range(count):
            numbers = [draw.randrange(1000) for _ in range(draw.randint(1, 6))]
            turns = [{"role": "user", "content": f"The sum of {numbers}?"}]
            turns.append({"role": "assistant", "content": str(sum(numbers))})
            rows.append(json.dumps({"messages": turns}))
        (folder / name).write_text("\n".join(rows) + "\n", encoding="utf-8")
    keys = {
        "model_name_or_path": str(make_model(folder / "model")),
        "train_dataset": str(folder / "train.jsonl"),
        "eval_dataset": str(folder / "held_out.jsonl"),
        "output_dir": str(folder / "run"),
        "device": "cpu",
        "bnb_4bit_compute_dtype": "float32",
        "lora_r": 8,
        "lora_dropout": 0.1,
        "max_length": 256,
        "packing": packing,
        "gradient_checkpointing": False,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": steps,
        "learning_rate": 5e-3,
        "logging_steps": 2,
        "eval_steps": 4,
        "save_steps": SAVE_STEPS,
        "eval_generate_rows": 2,
        "eval_max_new_tokens": 4,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(keys), encoding="utf-8")
    return path


def start(config: Path, run: Path, *words: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", "from fourfold.cli import main; main()", "train", str(config), "--json"]
    cache = {"HF_DATASETS_CACHE": str(run.with_name(f"{run.name}-cache"))}
    return subprocess.Popen(
        [*command, "--output_dir", str(run), *words],
        env={"OMP_NUM_THREADS": "1"} | os.environ | cache,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> None:
    """Wait for the end. Raises SystemExit with what the run said, if that was a failure."""
    said, _ = process.communicate(timeout=LIMIT_SECONDS)
    if process.returncode != 0:
        raise SystemExit(f"a run failed with status {process.returncode}:\n{said}")


def half_written(run: Path) -> list[str]:
    """The hidden names under which a run folder's files and folders are written or put aside."""
    return sorted(path.name for suffix in ("partial", "old") for path in run.glob(f".*.{suffix}"))


def kill(process: subprocess.Popen[str], run: Path, seconds: float, saving: int | None) -> tuple[float, list[str]]:
    """Kill a run so many seconds after its start, or into the saving of that number; which is counted from 1.

    Returns:
        When that was, and what was being written. Of a run that had ended before, the time is infinite.
    """
    began = time.monotonic()
    if saving is not None:
        seen: set[str] = set()
        while process.poll() is None and len(seen) < saving:
            # Of checkpoints alone: other files are rewritten more often.
            seen.update(name for name in half_written(run) if name.startswith(".checkpoint-"))
            time.sleep(0.0005)
        time.sleep(seconds)
    else:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=seconds)
    if process.poll() is not None:
        process.communicate()
        return float("inf"), []
    os.kill(process.pid, signal.SIGKILL)
    at_seconds = time.monotonic() - began
    process.communicate()
    return at_seconds, half_written(run)


def log_of(run: Path) -> list[dict[str, Any]]:
    """The records of a run without what differs between any two."""
    records = read_metrics(run / "metrics.jsonl")
    return [{key: value for key, value in record.items() if not key.endswith(MEASURED)} for record in records]


def weights_of(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def measure(variant: str, folder: Path, kills: int, steps: int, seed: int) -> Iterator[Kill]:
    """The runs of one variant."""
    draw = random.Random(f"{variant} {seed}")
    folder.mkdir()
    config = write_config(folder, packing=VARIANTS[variant], steps=steps)
    whole = folder / "whole"
    began = time.monotonic()
    finish(start(config, whole))
    duration = time.monotonic() - began
    weights, log = weights_of(whole), log_of(whole)
    savings = steps // SAVE_STEPS
    print(f"{variant}: not killed, {duration:.1f} s, {len(log)} records, {savings} checkpoints", flush=True)
    num_killed = 0
    while num_killed < kills:
        run = folder / f"killed-{num_killed}"
        is_aimed = draw.random() < AIMED_AT_SAVING
        # Into a saving: most of them take some milliseconds.
        moment = draw.uniform(0, 0.03) if is_aimed else draw.uniform(0, duration)
        saving = draw.randint(1, savings) if is_aimed else None
        at_seconds, during = kill(start(config, run), run, moment, saving)
        if at_seconds == float("inf"):
            # This one was quicker than the first; another moment is drawn.
            shutil.rmtree(run)
            continue
        metrics = run / "metrics.jsonl"
        records = read_metrics(metrics) if metrics.exists() else []
        last_step = max((record["step"] for record in records), default=0 if metrics.exists() else -1)
        checkpoints = list_checkpoints(run)
        finish(start(config, run, "--resume_from_checkpoint", "auto"))
        num_killed += 1
        made = Kill(
            variant,
            "saving" if is_aimed else "any moment",
            round(at_seconds, 3),
            during,
            last_step,
            int(checkpoints[-1].name.rpartition("-")[2]) if checkpoints else 0,
            weights_of(run) == weights,
            log_of(run) == log,
            half_written(run),
        )
        yield made
        if made.is_good:
            shutil.rmtree(run)


def show(kill: Kill) -> None:
    print(
        f"{kill.variant:<9}{kill.aim:<11}{kill.at_seconds:>7.2f} s  last step {kill.last_step:>3}  "
        f"from {kill.resumed_from:>3}  weights {'same' if kill.same_weights else 'DIFFER':<7}"
        f"metrics {'same' if kill.same_metrics else 'DIFFER':<7}"
        f"left {', '.join(kill.leftovers) or 'nothing'}  during {', '.join(kill.during) or '-'}",
        flush=True,
    )


def write_record(path: Path, found: list[Kill]) -> None:
    record = {
        "command": shlex.join(["python", "benchmarks/kill.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": installed_versions(),
        "good": sum(kill.is_good for kill in found),
        "kills": [asdict(kill) for kill in found],
    }
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each variant")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--folder", type=Path, help="where to; runs that end otherwise stay there")
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    folder = args.folder or Path(tempfile.mkdtemp(prefix="fourfold-kill-"))
    folder.mkdir(parents=True, exist_ok=True)
    found: list[Kill] = []
    for variant in args.variants:
        for made in measure(variant, folder / variant, args.kills, args.steps, args.seed):
            show(made)
            found.append(made)
            # After each: many take an hour.
            write_record(args.json, found)
    good = sum(kill.is_good for kill in found)
    print(f"{good} of {len(found)} killed runs went on and ended as the one that was not killed")
    if good < len(found):
        raise SystemExit(f"see the runs in {folder}")
    if args.folder is None:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
