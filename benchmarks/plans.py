"""What was planned beside the best that is found by trying: every policy, with every microbatch, one after the other.

    python benchmarks/plans.py [--settings 8b-4x2048-in-16GB ...] [--json FILE]

Every way is trained with once (random weights, 8-bit AdamW), its time and peak measured. Of those whose measured peak a
card would hold, the fastest is the best found; what the plan chose for the card, mixtures over the layers among them,
is measured as well. "slower by" compares the two times; "planning" is how long the plan took to make.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from transformers import LlamaConfig

import fourfold
from fourfold.memory.gpus import gpu_by_name, gpu_present
from fourfold.memory.planner import OptimizerBytes, make_plan
from fourfold.models.block import drop_graphs, set_recomputation
from fourfold.models.graphs import AUTO_TOKENS
from fourfold.models.model_shape import ModelShape, model_shape
from fourfold.models.recomputation import POLICIES
from fourfold.optimizers import AdamW
from fourfold.optimizers.footprint import state_bytes
from memory import LINEARS, SHAPES, about, make_step, random_model

GIB = 2**30


@dataclass(frozen=True)
class Setting:
    """A shape, the rows of an optimizer step, and the memory of a card."""

    shape: str
    rows: int
    seq: int
    gib: float

    @property
    def name(self) -> str:
        return f"{self.shape}-{self.rows}x{self.seq}-in-{self.gib:g}GB"


SETTINGS = [
    Setting("8b", 4, 2048, 10),
    Setting("8b", 4, 2048, 16),
    Setting("8b", 4, 2048, 24),
    Setting("1b", 4, 2048, 4),
    Setting("1b", 4, 2048, 8),
    Setting("1b", 2, 8192, 6),
]
TINY = [Setting("tiny", 2, 64, 1)]


@dataclass(frozen=True)
class Way:
    """How a step is run, and what it took: seconds a row, bytes at the peak."""

    batch: int
    policies: str
    seconds: float
    peak: int


class Trials:
    """One model, on which ways are tried."""

    def __init__(self, shape: str, device: torch.device) -> None:
        self.config = LlamaConfig(**SHAPES[shape], max_position_embeddings=131072)
        self.shape: ModelShape = model_shape(self.config, fourfold.FourfoldConfig(), 16)
        self.device = device
        torch.manual_seed(0)
        adapter = LoraConfig(r=16, lora_alpha=16, target_modules=LINEARS, task_type="CAUSAL_LM")
        self.model: PeftModel = fourfold.prepare(random_model(self.config, True, device), adapter, fused=True)
        self.model.train()
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = AdamW(trained, lr=1e-5, state_bits=8, max_grad_norm=1.0)

    def measure(self, batch: int, seq: int, policies: str | Sequence[str]) -> Way | None:
        """None where memory runs out."""
        set_recomputation(self.model, policies)
        # Those of another length would stay until enough of this one came.
        drop_graphs(self.model)
        gc.collect()
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        step = make_step(self.model, self.optimizer, batch, seq, self.device)
        # Graphs are captured in the third step; without them, what is slow happens in the first.
        warm_up = 3 if batch * seq <= AUTO_TOKENS else 1
        seconds = []
        try:
            for _ in range(warm_up + 3):
                start = time.perf_counter()
                float(step())
                seconds.append(time.perf_counter() - start)
        except torch.OutOfMemoryError:
            return None
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        told = policies if isinstance(policies, str) else ", ".join(policies)
        return Way(batch, told, statistics.median(seconds[warm_up:]) / batch, peak)


def compare(trials: Trials, settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """Settings of one shape that differ in the card alone."""
    rows, seq = settings[0].rows, settings[0].seq
    ways = []
    for batch in (size for size in range(1, rows + 1) if rows % size == 0):
        for policy in POLICIES:
            way = trials.measure(batch, seq, policy)
            if way is not None:
                ways.append(way)
                print(f"    {batch} x {seq}, {policy}: {way.seconds:.4f} s a row, {way.peak / GIB:.2f} GiB", flush=True)
    results = []
    for setting in settings:
        gpu = replace(gpu_present() or gpu_by_name("H200"), memory_bytes=int(setting.gib * GIB))
        optimizer = OptimizerBytes("adamw_8bit", state_bytes("adamw", 8, trials.shape.adapter_shapes))
        start = time.perf_counter()
        plan = make_plan(trials.shape, gpu, rows=rows, seq=seq, optimizers=[optimizer])
        planning = time.perf_counter() - start
        result: dict[str, Any] = {"name": setting.name, "setting": asdict(setting), "planning_seconds": planning}
        chosen = plan.chosen
        fitting = [way for way in ways if way.peak <= gpu.usable_bytes]
        if chosen is not None and fitting:
            best = min(fitting, key=lambda way: way.seconds)
            planned = trials.measure(chosen.batch, seq, chosen.policies)
            assert planned is not None
            planned = replace(planned, policies=chosen.recompute_text)
            result |= {
                "best": asdict(best),
                "planned": asdict(planned),
                "planned_bytes": chosen.footprint.peak_bytes,
                "usable_bytes": gpu.usable_bytes,
                "slower_by": planned.seconds / best.seconds - 1,
            }
        results.append({**result, "ways": [asdict(way) for way in ways]})
        print(shown(results[-1]), flush=True)
    return results


def shown(row: dict[str, Any]) -> str:
    if "best" not in row:
        return f"{row['name']}: nothing fits"
    best, planned = row["best"], row["planned"]
    return (
        f"{row['name']}: planned {planned['batch']} rows, {planned['policies']}: {planned['seconds']:.4f} s a row, "
        f"{planned['peak'] / GIB:.2f} of {row['usable_bytes'] / GIB:.2f} GiB; best found {best['batch']} rows, "
        f"{best['policies']}: {best['seconds']:.4f} s; slower by {row['slower_by']:+.1%}; "
        f"planning {row['planning_seconds']:.2f} s"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {setting.name: setting for setting in (*SETTINGS, *TINY)}
    default = [setting.name for setting in SETTINGS]
    parser.add_argument("--settings", nargs="+", choices=names, default=default, metavar="SETTING")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    record = about(f"python benchmarks/plans.py --json {args.json}")
    groups: dict[str, dict[tuple[int, int], list[Setting]]] = {}
    for setting in (names[name] for name in args.settings):
        groups.setdefault(setting.shape, {}).setdefault((setting.rows, setting.seq), []).append(setting)
    results: list[dict[str, Any]] = []
    for shape, by_rows in groups.items():
        trials = Trials(shape, device)
        for settings in by_rows.values():
            results += compare(trials, settings)
            if args.json is not None:
                # After each: what was measured is not lost with what was not.
                args.json.write_text(json.dumps({**record, "rows": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
