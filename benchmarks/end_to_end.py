"""Training steps of fourfold and of its peers, in turn, on one GPU: the same model, tokens, adapter and settings.

    python benchmarks/end_to_end.py --models DIR --tokenizer DIR [--settings 8b-4x2048 ...]
        [--systems fourfold unsloth ...] [--repeats 2] [--json FILE] [--profile DIR]
    python benchmarks/end_to_end.py --quick        a tiny model on the CPU, to see that everything runs

DIR/8b and DIR/1b hold the checkpoints; one that is missing is made with random weights by shapes.py. Each measurement
is a process of its own, so that no system meets another's patches, caches or memory; with --repeats the systems take
turns (A B A B), so that a drift of the machine shows in the spread. A system whose package is missing is reported as
skipped.

All train LoRA of rank 16 on the seven linears over NF4 with double quantization, in bf16, without dropout, with 8-bit
AdamW and without clipping, on the same batch each step, every token labelled. "vs floor" is the step over the floor of
floor.py for what the system computes again: everything for a peer with gradient checkpointing, and for fourfold what
its policy says. "peak GiB" is torch's max_memory_allocated from the first training step on.

The losses must agree, or the command fails: they are what shows that all systems trained the same thing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Setting:
    """A row of the benchmark.

    Args:
        policy: fourfold's recomputation policy. Where it is "none" the peers save all activations too; else they run
            their own gradient checkpointing.
    """

    shape: str
    batch: int
    seq: int
    policy: str

    @property
    def recompute(self) -> bool:
        return self.policy != "none"


SETTINGS = {
    "8b-4x2048-recompute": Setting("8b", 4, 2048, "selective_offload"),
    "8b-4x2048": Setting("8b", 4, 2048, "none"),
    "8b-4x2048-mlp": Setting("8b", 4, 2048, "mlp"),
    "8b-4x2048-selective": Setting("8b", 4, 2048, "selective"),
    "8b-4x2048-full": Setting("8b", 4, 2048, "full"),
    "8b-1x2048-recompute": Setting("8b", 1, 2048, "selective"),
    "8b-1x32768-recompute": Setting("8b", 1, 32768, "mlp_offload"),
    "1b-4x2048-recompute": Setting("1b", 4, 2048, "selective_offload"),
    "1b-4x2048": Setting("1b", 4, 2048, "none"),
    "tiny-2x32": Setting("tiny", 2, 32, "none"),
    "tiny-2x32-recompute": Setting("tiny", 2, 32, "selective"),
}
SYSTEMS = ("fourfold", "unsloth", "peft-bnb", "peft-bnb-liger")
QUICK_SETTINGS = ("tiny-2x32", "tiny-2x32-recompute")
QUICK_SYSTEMS = ("fourfold", "peft-bnb")

# Weights and adapters are the same at first, so the first losses are, up to the rounding of bf16. A logit of
# these models has a standard deviation of about 1.3 and comes out of 32 layers with a relative error of about 1%,
# independent from token to token: 0.013 a token, and 3e-4 in the mean of 2,048 of them. This is six times that.
FIRST_LOSS_BOUND = 2e-3
# Later, all have gone the same way from the same A and B: what separates them is a share of how far they went. AdamW's
# first steps move every element by about the learning rate, whatever its gradient's size, so that elements whose
# gradient is no larger than its rounding error go either way; they contribute little, which is why the share is small.
LATER_LOSS_SHARE = 0.05


def main() -> None:
    args = parse_arguments()
    results: dict[str, Any] = {}
    record = {
        "command": shlex.join(["python", "benchmarks/end_to_end.py", *sys.argv[1:]]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": args.commit or commit(),
        "results": results,
    }
    faults = []
    for name in args.settings:
        with tempfile.TemporaryDirectory() as scratch:
            result = results[name] = measure_setting(name, args, Path(scratch))
        print("\n" + "\n".join(table(name, result)), flush=True)
        faults += [f"{name}: {fault}" for fault in result["disagreements"]]
        for system, runs in result["systems"].items():
            faults += [f"{name}: {system} failed:\n{run['reason']}" for run in runs if run["status"] == "failed"]
        faults += [f"{name}: the floor failed:\n{result['floor_failed']}"] if result["floor_failed"] else []
        if args.json:
            # After each setting: what is measured stays, should the time for the rest run out.
            args.json.write_text(json.dumps(record, indent=1) + "\n")
    for fault in faults:
        print(f"\n{fault}", file=sys.stderr)
    sys.exit(bool(faults))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="folder that holds, or will hold, one checkpoint a shape")
    parser.add_argument("--tokenizer", type=Path, help="its files are put beside checkpoints that are made")
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, metavar="SETTING", help=", ".join(SETTINGS))
    parser.add_argument("--systems", nargs="+", choices=[*SYSTEMS, "fourfold-generic"])
    parser.add_argument("--policy", help="fourfold's recomputation policy in settings that recompute")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--steps", type=int, default=6, help="measured steps, after three that are not")
    parser.add_argument("--no-floor", action="store_true", help="leave out the floor, and the ratio to it")
    parser.add_argument("--profile", type=Path, help="folder for a profile of one step of each system, as text")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--commit", help="what is measured, where the code lies outside a git repository")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one process")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    args.device = "cpu" if args.quick else "cuda"
    args.settings = args.settings or list(QUICK_SETTINGS if args.quick else [n for n in SETTINGS if n[:4] != "tiny"])
    args.systems = args.systems or list(QUICK_SYSTEMS if args.quick else SYSTEMS)
    if not args.quick and args.models is None:
        parser.error("--models is needed, unless --quick")
    if args.profile:
        args.profile.mkdir(parents=True, exist_ok=True)
    return args


def measure_setting(name: str, args: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    """Every system's runs of one setting, the floor, and how far the losses lie apart."""
    setting = SETTINGS[name]
    model = checkpoint(setting.shape, args, scratch)
    policy = args.policy if args.policy and setting.recompute else setting.policy
    systems: dict[str, list[dict[str, Any]]] = {system: [] for system in args.systems}
    for repeat in range(args.repeats):
        for system, runs in systems.items():
            if runs and runs[0]["status"] != "measured":
                continue
            runs.append(run_worker(system, setting, policy, model, args, scratch, is_profiled=repeat == 0))
            print(f"{name} {system}: {brief(runs[-1])}", file=sys.stderr, flush=True)
    kinds = {system: floor_kind(system, setting, policy, args.device) for system in systems}
    floors, floor_failed = ({}, None) if args.no_floor else floor(set(kinds.values()), setting, model, args, scratch)
    losses = {
        f"{system}, run {number}": run["losses"]
        for system, runs in systems.items()
        for number, run in enumerate(runs, 1)
        if run["status"] == "measured"
    }
    return {
        "setting": vars(setting) | {"policy": policy},
        "systems": systems,
        "floor_seconds": floors,
        "floor_kinds": kinds,
        "floor_failed": floor_failed,
        "disagreements": disagreements(losses),
    }


def checkpoint(shape: str, args: argparse.Namespace, scratch: Path) -> Path:
    """The folder of a shape's checkpoint, made if it is not there."""
    folder = (args.models or scratch).resolve() / shape
    if not (folder / "config.json").is_file():
        words = ["--tokenizer", str(args.tokenizer)] if args.tokenizer else []
        subprocess.run([sys.executable, HERE / "shapes.py", shape, folder, *words], env=environment(), check=True)
    return folder


def environment() -> dict[str, str]:
    """No hub is asked over the network, and relative paths hold in a process that runs elsewhere."""
    paths = [str(Path(path).resolve()) for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    offline = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"), "1")
    quiet = {"UNSLOTH_DISABLE_STATISTICS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **offline, **quiet, "PYTHONPATH": os.pathsep.join(paths)}


def run_worker(
    system: str,
    setting: Setting,
    policy: str,
    model: Path,
    args: argparse.Namespace,
    scratch: Path,
    *,
    is_profiled: bool,
) -> dict[str, Any]:
    job = {
        "system": system,
        "model": str(model),
        "batch": setting.batch,
        "seq": setting.seq,
        "recompute": setting.recompute,
        "policy": policy if system == "fourfold" and args.device == "cuda" else None,
        "device": args.device,
        "dtype": "bfloat16" if args.device == "cuda" else "float32",
        "steps": args.steps,
    }
    words: list[str | Path] = [HERE / "peers" / "worker.py", json.dumps(job)]
    profile: list[str | Path] = []
    if args.profile and is_profiled:
        name = f"{setting.shape}-{setting.batch}x{setting.seq}-{policy}.{system}.txt"
        profile = ["--profile", args.profile.resolve() / name]
    return run_process(words, profile, args.timeout, scratch)


def run_process(words: list[str | Path], more: list[str | Path], timeout: float, scratch: Path) -> dict[str, Any]:
    """What a script wrote as JSON into the file it was told; where it failed, that status and the end of its output."""
    out = scratch / "out.json"
    out.unlink(missing_ok=True)
    try:
        # In the scratch folder, because Unsloth writes what it compiles into the current one.
        process = subprocess.run(
            [sys.executable, *words, out, *more],
            cwd=scratch,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=timeout,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"status": "failed", "reason": f"still running after {timeout:.0f} s"}
    if process.returncode != 0 or not out.exists():
        return {"status": "failed", "reason": f"exit code {process.returncode}\n{process.stdout[-4000:]}"}
    return json.loads(out.read_text())


def brief(run: dict[str, Any]) -> str:
    if run["status"] != "measured":
        return f"{run['status']}: {run['reason'].splitlines()[-1]}"
    return f"{statistics.median(run['step_seconds']):.4f} s/step, loaded in {run['load_seconds']:.1f} s"


def floor_kind(system: str, setting: Setting, policy: str, device: str) -> str:
    """What a system computes again, as floor.py names it."""
    if not setting.recompute:
        return "none"
    return policy.removesuffix("_offload") if system == "fourfold" and device == "cuda" else "all"


def floor(
    kinds: set[str], setting: Setting, model: Path, args: argparse.Namespace, scratch: Path
) -> tuple[dict[str, float], str | None]:
    """Seconds of a step of each kind; and why there are none."""
    words: list[str | Path] = [HERE / "floor.py", model, "--batch", str(setting.batch), "--seq", str(setting.seq)]
    words += ["--device", args.device, "--kinds", *sorted(kinds), "--out"]
    floors = run_process(words, [], args.timeout, scratch)
    return ({}, floors["reason"]) if "status" in floors else (floors, None)


def disagreements(losses: dict[str, list[float]]) -> list[str]:
    """Where the losses of a run and of the first one, step by step, lie further apart than rounding explains."""
    found = []
    reference = next(iter(losses), None)
    for other in losses:
        # The first is compared with itself, so that a loss which is not a number is found in it, too.
        for step, (ours, theirs) in enumerate(zip(losses[reference], losses[other], strict=True)):
            way = abs(losses[reference][0] - ours)
            bound = FIRST_LOSS_BOUND + LATER_LOSS_SHARE * way
            if not abs(ours - theirs) <= bound:
                found.append(
                    f"step {step + 1}: the losses of [{reference}] and [{other}] differ by {abs(ours - theirs):.2g}, "
                    f"more than {bound:.2g} ({ours:.5f}, {theirs:.5f})"
                )
    return found


def table(name: str, result: dict[str, Any]) -> Iterator[str]:
    """A setting's results as a Markdown table."""
    setting, systems, floors = result["setting"], result["systems"], result["floor_seconds"]
    tokens = setting["batch"] * setting["seq"]
    times = {
        system: [second for run in runs if run["status"] == "measured" for second in run["step_seconds"]]
        for system, runs in systems.items()
    }
    medians = {system: statistics.median(values) for system, values in times.items() if values}
    yield f"{name} (policy {setting['policy']})"
    yield ""
    yield "| system | s/step (min..max) | tok/s | peak GiB | vs Unsloth | vs floor | loss, first and last |"
    yield "|---|---|---|---|---|---|---|"
    for system, runs in systems.items():
        if system not in medians:
            yield f"| {system} | {runs[0]['status']}: {runs[0]['reason'].splitlines()[-1]} | | | | | |"
            continue
        first = runs[0]
        median = medians[system]
        peak = max((run["peak_gib"] for run in runs if "peak_gib" in run), default=None)
        floor_seconds = floors.get(result["floor_kinds"][system])
        cells = [
            system,
            f"{median:.4f} ({min(times[system]):.4f}..{max(times[system]):.4f})",
            f"{tokens / median:,.0f}",
            f"{peak:.2f}" if peak is not None else "",
            f"{medians['unsloth'] / median:.3f}" if "unsloth" in medians else "",
            f"{median / floor_seconds:.3f} ({result['floor_kinds'][system]})" if floor_seconds else "",
            f"{first['losses'][0]:.5f}, {first['losses'][-1]:.5f}",
        ]
        yield "| " + " | ".join(cells) + " |"
    yield ""
    for kind, floor_seconds in floors.items():
        yield f"floor, {kind}: {floor_seconds:.4f} s, {tokens / floor_seconds:,.0f} tok/s"
    reference, *others = [system for system in systems if system in medians] or [""]
    for other in others:
        pairs = list(zip(systems[reference][0]["losses"], systems[other][0]["losses"], strict=True))
        first, largest = abs(pairs[0][0] - pairs[0][1]), max(abs(ours - theirs) for ours, theirs in pairs)
        yield f"losses of {reference} and {other}: {first:.2g} apart at the first step, at most {largest:.2g} later"


def commit() -> str | None:
    """The commit the code lies at; with "+" where files differ from it; None outside a repository."""
    git = ["git", "-C", str(HERE)]
    answer = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if answer.returncode != 0:
        return None
    changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False).stdout
    return answer.stdout.strip() + ("+" if changed.strip() else "")


if __name__ == "__main__":
    main()
