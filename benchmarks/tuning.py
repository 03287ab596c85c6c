"""A search over the quickstart's model and task, killed with SIGKILL again and again: what it finds, and what it loses.

    python benchmarks/tuning.py [--trials 20] [--kills 3] [--json FILE]

`fourfold tune` looks for learning rate, rank, alpha and schedule for a few steps of SmolLM2-135M on a CPU or a GPU. The
first trial is the default configuration, so that all are compared at equal steps, rows and seed. The search is killed
in the midst of a trial, after every so many finished ones, and started again by the same command. What had finished
before a kill is read from the study's storage then, and compared with what it holds at the end.
"""

from __future__ import annotations

import argparse
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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import optuna
import yaml

from fourfold.training.run_folder import installed_versions

RESULTS = Path(__file__).parent / "results" / "tuning.json"
QUICKSTART = Path(__file__).parents[1] / "examples" / "quickstart"
SPACE = {
    "learning_rate": {"low": 1e-5, "high": 3e-2, "log": True},
    "lora_r": [4, 8, 16, 32],
    "lora_alpha": [8, 16, 32, 64],
    "lr_scheduler_type": ["cosine", "linear", "constant_with_warmup"],
}
LIMIT_SECONDS = 3600


def write_config(folder: Path, trials: int, steps: int, rows: int, held_out_rows: int) -> Path:
    sys.path.insert(0, str(QUICKSTART))
    from model import bring_model
    from task import write_task

    train, held_out = write_task(folder, num_train=steps * rows, num_held_out=held_out_rows)
    keys = {
        "model_name_or_path": str(bring_model()),
        "output_dir": str(folder / "study"),
        "train_dataset": str(train),
        "eval_dataset": str(held_out),
        "max_length": 128,
        "max_steps": steps,
        "eval_steps": steps // 2 if steps > 3 else steps,
        "save_steps": steps,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "search": {"space": SPACE, "n_trials": trials},
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(keys, sort_keys=False), encoding="utf-8")
    return path


def ended(folder: Path) -> dict[int, dict[str, Any]]:
    """Finished and pruned trials as Optuna itself reads them from the storage, by number."""
    journal = folder / "study" / "study.journal"
    if not journal.exists():
        return {}
    storage = optuna.storages.JournalStorage(optuna.storages.journal.JournalFileBackend(str(journal)))
    names = optuna.get_all_study_names(storage)
    trials = optuna.load_study(study_name=names[0], storage=storage).trials if names else []
    states = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    return {
        trial.number: {"state": trial.state.name, "values": trial.values, "params": trial.params}
        for trial in trials
        if trial.state in states
    }


def start(config: Path) -> subprocess.Popen[bytes]:
    words = [sys.executable, "-c", "from fourfold.cli import main; main()", "tune", str(config)]
    return subprocess.Popen(words)


def kill(process: subprocess.Popen[bytes], folder: Path, after: int, seconds: float) -> dict[str, Any]:
    """Kill the search so many seconds after that many trials have ended."""
    while process.poll() is None and len(ended(folder)) < after:
        time.sleep(0.3)
    time.sleep(seconds)
    if process.poll() is not None:
        raise SystemExit("the search had ended before it was to be killed")
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return {"after": after, "ended": ended(folder)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--rows", type=int, default=4, help="of a step")
    parser.add_argument("--held-out", type=int, default=16, help="rows that the loss is of")
    parser.add_argument("--json", type=Path, default=RESULTS)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    folder = Path(tempfile.mkdtemp(prefix="fourfold-tuning-"))
    config = write_config(folder, args.trials, args.steps, args.rows, args.held_out)
    draw = random.Random(0)
    began = time.monotonic()
    kills = [
        kill(start(config), folder, args.trials * number // (args.kills + 1), draw.uniform(0.5, 3))
        for number in range(1, args.kills + 1)
    ]
    if start(config).wait(LIMIT_SECONDS) != 0:
        raise SystemExit(f"the search failed; see {folder}")
    seconds = time.monotonic() - began
    at_end = ended(folder)
    lost = [number for each in kills for number, trial in each["ended"].items() if at_end.get(number) != trial]
    trials = json.loads((folder / "study" / "trials.json").read_text(encoding="utf-8"))
    finished = [trial for trial in trials if trial["outcome"] == "finished"]
    best = min(finished, key=lambda trial: trial["values"]["eval_loss"])
    record = {
        "command": shlex.join(["python", "benchmarks/tuning.py", *sys.argv[1:]]),
        "date": datetime.now(UTC).date().isoformat(),
        "versions": installed_versions() | {"optuna": optuna.__version__},
        "steps": args.steps,
        "rows": args.rows,
        "held_out_rows": args.held_out,
        "default_eval_loss": trials[0]["values"]["eval_loss"],
        "best_eval_loss": best["values"]["eval_loss"],
        "best": best["params"],
        "kills": [{"after": each["after"], "ended_before": len(each["ended"])} for each in kills],
        "lost_trials": len(lost),
        "ended_trials": len(at_end),
        "seconds": round(seconds),
        "trials": trials,
    }
    args.json.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    print(f"default {record['default_eval_loss']:.4f}, best {record['best_eval_loss']:.4f} by {best['params']}")
    print(f"{len(kills)} kills, {len(lost)} finished trials lost, {len(at_end)} ended, {seconds:.0f} s")
    if lost:
        raise SystemExit(f"trials {lost} are gone; see {folder}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
