"""What a plan decided: a way to run a step, why the next faster one does not fit, and how that is told."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from fourfold.memory.footprint import Footprint
from fourfold.memory.gpus import Gpu
from fourfold.memory.parallel import ONE_GPU, Parallelism

__all__ = ["Candidate", "OptimizerBytes", "Plan"]

GIB = 2**30
# Of strategies that `fourfold train` does not run.
FORECAST = "a forecast only"


@dataclass(frozen=True)
class OptimizerBytes:
    """What an optimizer takes.

    Args:
        name: As `optim` names it.
        gpu, staging, host: State on the GPU, what paging works in there, state in host memory: of all trained weights.
        working: What an update works in on the GPU.
    """

    name: str
    gpu: int
    staging: int = 0
    host: int = 0
    working: int = 0


@dataclass(frozen=True)
class Candidate:
    """One way to run a step.

    Args:
        batch: Rows of a GPU's microbatch.
        accumulation: Microbatches of a step.
        policies: Recomputation policy of each layer.
        optimizer: Name of the optimizer.
        seconds: Of a step, predicted.
        tokens_per_second: Predicted, of all GPUs together.
        footprint: Bytes, by part, of one GPU.
        runs_by_graphs: Whether blocks are replayed as CUDA graphs.
        parallelism: How GPUs share the run.
        traffic: Bytes that pass from and to each GPU in a step, by kind.
        stage: Of a pipeline, the stage whose footprint it is, the largest.
    """

    batch: int
    accumulation: int
    policies: tuple[str, ...]
    optimizer: str
    seconds: float
    tokens_per_second: float
    footprint: Footprint
    runs_by_graphs: bool = False
    parallelism: Parallelism = ONE_GPU
    traffic: Mapping[str, int] = field(default_factory=dict)
    stage: int | None = None

    @property
    def traffic_bytes(self) -> int:
        return sum(self.traffic.values())

    @property
    def host_bytes(self) -> int:
        """Host memory of all GPUs' processes."""
        return self.footprint.host_bytes * self.parallelism.num_gpus

    @property
    def recompute(self) -> str | list[str]:
        """As the configuration takes it."""
        return self.policies[0] if len(set(self.policies)) == 1 else list(self.policies)

    @property
    def recompute_text(self) -> str:
        """For people: runs of equal policies, as "full x 20, selective x 12"."""
        runs = [(name, len(list(group))) for name, group in itertools.groupby(self.policies)]
        return runs[0][0] if len(runs) == 1 else ", ".join(f"{name} x {count}" for name, count in runs)


@dataclass(frozen=True)
class Plan:
    """What was decided.

    Args:
        gpu: The GPU it is for, or each of them.
        seq: Tokens of a row.
        chosen: The fastest that fits; None where nothing does.
        faster: Of those that are faster by more than a tie and do not fit, the one that takes the least; None where
            there is none.
        smallest: The one that takes the least, where nothing fits.
        num_tried: How many were looked at.
        host_bytes: Host memory that may be used; None: any.
        by_strategy: Of several GPUs, the plan of each strategy that was compared.
        refused: Strategies of which there is no plan, and why.
        not_run: Why `fourfold train` does not run what was planned, which is a forecast only then.
    """

    gpu: Gpu
    seq: int
    chosen: Candidate | None
    faster: Candidate | None
    smallest: Candidate | None
    num_tried: int
    host_bytes: int | None = None
    by_strategy: Mapping[str, Plan] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)
    not_run: str | None = None

    def shortage(self, candidate: Candidate) -> int:
        """Bytes by which it does not fit the GPU."""
        return max(0, candidate.footprint.peak_bytes - self.gpu.usable_bytes)

    def fits(self, candidate: Candidate) -> bool:
        return not self.shortage(candidate) and not self.host_shortage(candidate)

    def host_shortage(self, candidate: Candidate) -> int:
        """Bytes by which it does not fit the host."""
        return 0 if self.host_bytes is None else max(0, candidate.host_bytes - self.host_bytes)

    def lacking(self, candidate: Candidate) -> str:
        """How much it takes too much, in few words."""
        if self.shortage(candidate):
            return f"{self.shortage(candidate) / GIB:.2f} GiB too much"
        return f"{self.host_shortage(candidate) / GIB:.1f} GiB of host memory too much"

    def why_not(self, candidate: Candidate) -> str:
        """Where it does not fit."""
        if self.shortage(candidate):
            moment = candidate.footprint.moment
            return f"{self.shortage(candidate) / GIB:.2f} GiB too much for the GPU, in the {moment}"
        assert self.host_bytes is not None
        short = self.host_shortage(candidate) / GIB
        return f"{short:.1f} GiB more of host memory than the {self.host_bytes / GIB:.1f} GiB there are"

    def lines(self) -> list[str]:
        """For people."""
        usable = f"{self.gpu.usable_bytes / GIB:.1f} GiB usable of {self.gpu.memory_bytes / GIB:.1f}"
        best = self.chosen or self.smallest
        assert best is not None
        num_gpus = best.parallelism.num_gpus
        count, each = (f"{num_gpus} x ", " each") if num_gpus > 1 else ("", "")
        lines = [f"plan for {count}{self.gpu.name}: {usable}{each}"]
        if self.not_run is not None:
            lines.append(f"  {FORECAST}: {self.not_run}")
        if self.chosen is None:
            needed = best.footprint.peak_bytes / GIB
            lines.append(
                f"nothing fits: the smallest, {_told(best)}, takes {needed:.2f} GiB{each}, {self.why_not(best)}"
            )
            return lines
        peak = self.chosen.footprint
        host = f", {best.host_bytes / GIB:.1f} GiB of host memory" if best.host_bytes else ""
        together = " together" if num_gpus > 1 else ""
        speed = f"{best.tokens_per_second:,.0f} tokens/s{together}"
        lines.append(f"  {_told(best)}")
        lines.append(f"  {speed}, peak {peak.peak_bytes / GIB:.2f} GiB{each} in the {peak.moment}{host}")
        if best.traffic_bytes:
            passed = ", ".join(f"{size / 1e9:.2f} GB {kind}" for kind, size in best.traffic.items())
            lines.append(f"  to and from each GPU in a step of {best.seconds:.2f} s: {passed}")
        lines += [f"    {size / GIB:7.2f} GiB  {name}" for name, size in _sorted(peak.parts)]
        if self.faster is not None:
            gain = self.faster.tokens_per_second / self.chosen.tokens_per_second - 1
            lines.append(f"  {_told(self.faster)} would be {gain:.0%} faster, and takes {self.why_not(self.faster)}")
        return lines

    def to_dict(self) -> dict[str, Any]:
        """For machines: numbers in bytes and seconds."""
        return {
            "gpu": asdict(self.gpu) | {"usable_bytes": self.gpu.usable_bytes},
            "seq": self.seq,
            "chosen": self._entry(self.chosen),
            "faster": self._entry(self.faster),
            "smallest": self._entry(self.smallest),
            "num_tried": self.num_tried,
            "not_run": self.not_run,
            "strategies": {name: plan.to_dict() for name, plan in self.by_strategy.items()},
            "refused": dict(self.refused),
        }

    def _entry(self, candidate: Candidate | None) -> dict[str, Any] | None:
        if candidate is None:
            return None
        entry: dict[str, Any] = {
            "num_gpus": candidate.parallelism.num_gpus,
            "strategy": candidate.parallelism.strategy if candidate.parallelism.num_gpus > 1 else None,
            "offload": candidate.parallelism.offload,
            "stage": candidate.stage,
            "per_device_train_batch_size": candidate.batch,
            "gradient_accumulation_steps": candidate.accumulation,
            "recompute": candidate.recompute,
            "optim": candidate.optimizer,
            "step_seconds": candidate.seconds,
            "tokens_per_second": candidate.tokens_per_second,
            "traffic_bytes": candidate.traffic_bytes,
            "traffic": dict(candidate.traffic),
        }
        held = candidate.footprint
        return entry | {
            "peak_bytes": held.peak_bytes,
            "peak_in": held.moment,
            "parts": held.parts,
            "kinds": held.kinds,
            "working_memory": held.detail,
            "host": held.host,
            "shortage_bytes": self.shortage(candidate),
            "host_shortage_bytes": self.host_shortage(candidate),
        }


def _sorted(parts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(parts.items(), key=lambda part: -part[1])


def _told(candidate: Candidate) -> str:
    steps = f" x {candidate.accumulation}" if candidate.accumulation > 1 else ""
    rows = f"{candidate.batch} row{'s' if candidate.batch > 1 else ''}{steps}"
    text = f"{rows}, recompute {candidate.recompute_text}, {_optimizer_text(candidate)}"
    return f"{candidate.parallelism.name}: {text}" if candidate.parallelism.num_gpus > 1 else text


def _optimizer_text(candidate: Candidate) -> str:
    """Its name, and where its state is."""
    held = candidate.footprint
    for place, size in (
        ("on the GPU", held.parts.get("optimizer state", 0)),
        ("in host memory", held.host.get("optimizer state", 0)),
    ):
        if size:
            return f"{candidate.optimizer} ({size / GIB:.2f} GiB {place})"
    return candidate.optimizer
