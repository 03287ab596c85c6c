"""The fastest way to train that fits a GPU, and why the next faster one does not."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from fourfold.memory.footprint import Footprint, Step, footprint
from fourfold.memory.gpus import Gpu
from fourfold.memory.speed import step_seconds
from fourfold.models.model_shape import ModelShape
from fourfold.models.recomputation import POLICIES

__all__ = ["Candidate", "OptimizerBytes", "Plan", "make_plan"]

GIB = 2**30


@dataclass(frozen=True)
class OptimizerBytes:
    """What an optimizer takes.

    Args:
        name: As `optim` names it.
        gpu, staging, host: State on the GPU, what paging works in there, state in host memory.
    """

    name: str
    gpu: int
    staging: int = 0
    host: int = 0


@dataclass(frozen=True)
class Candidate:
    """One way to run a step.

    Args:
        batch: Rows of a microbatch.
        accumulation: Microbatches of a step.
        policies: Recomputation policy of each layer.
        optimizer: Name of the optimizer.
        seconds: Of a step, predicted.
        tokens_per_second: Predicted.
        footprint: Bytes, by part.
    """

    batch: int
    accumulation: int
    policies: tuple[str, ...]
    optimizer: str
    seconds: float
    tokens_per_second: float
    footprint: Footprint

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
        gpu: The GPU it is for.
        seq: Tokens of a row.
        chosen: The fastest that fits; None where nothing does.
        faster: The next faster one, which does not fit; None where the fastest does.
        smallest: The one that takes the least, where nothing fits.
        num_tried: How many were looked at.
        host_bytes: Host memory that may be used; None: any.
    """

    gpu: Gpu
    seq: int
    chosen: Candidate | None
    faster: Candidate | None
    smallest: Candidate | None
    num_tried: int
    host_bytes: int | None = None

    def shortage(self, candidate: Candidate) -> int:
        """Bytes by which it does not fit the GPU."""
        return max(0, candidate.footprint.peak_bytes - self.gpu.usable_bytes)

    def why_not(self, candidate: Candidate) -> str:
        """Where it does not fit."""
        if self.shortage(candidate):
            moment = candidate.footprint.moment
            return f"{self.shortage(candidate) / GIB:.2f} GiB too much for the GPU, in the {moment}"
        assert self.host_bytes is not None
        short = candidate.footprint.host_bytes - self.host_bytes
        return f"{short / GIB:.1f} GiB more of host memory than the {self.host_bytes / GIB:.1f} GiB there are"

    def lines(self) -> list[str]:
        """For people."""
        usable = f"{self.gpu.usable_bytes / GIB:.1f} GiB usable of {self.gpu.memory_bytes / GIB:.1f}"
        lines = [f"plan for {self.gpu.name}: {usable}"]
        if self.chosen is None:
            assert self.smallest is not None
            needed = self.smallest.footprint.peak_bytes / GIB
            lines.append(
                f"nothing fits: the smallest, {_told(self.smallest)}, takes {needed:.2f} GiB, "
                f"{self.why_not(self.smallest)}"
            )
            return lines
        peak = self.chosen.footprint
        host = f", {peak.host_bytes / GIB:.1f} GiB of host memory" if peak.host_bytes else ""
        speed = f"{self.chosen.tokens_per_second:,.0f} tokens/s"
        lines.append(f"  {_told(self.chosen)}")
        lines.append(f"  {speed}, peak {peak.peak_bytes / GIB:.2f} GiB in the {peak.moment}{host}")
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
        }

    def _entry(self, candidate: Candidate | None) -> dict[str, Any] | None:
        if candidate is None:
            return None
        entry = {
            "per_device_train_batch_size": candidate.batch,
            "gradient_accumulation_steps": candidate.accumulation,
            "recompute": candidate.recompute,
            "optim": candidate.optimizer,
            "step_seconds": candidate.seconds,
            "tokens_per_second": candidate.tokens_per_second,
        }
        held = candidate.footprint
        return entry | {
            "peak_bytes": held.peak_bytes,
            "peak_in": held.moment,
            "parts": held.parts,
            "working_memory": held.detail,
            "host": held.host,
            "shortage_bytes": self.shortage(candidate),
        }


def _sorted(parts: dict[str, int]) -> list[tuple[str, int]]:
    return sorted(parts.items(), key=lambda part: -part[1])


def _told(candidate: Candidate) -> str:
    steps = f" x {candidate.accumulation}" if candidate.accumulation > 1 else ""
    rows = f"{candidate.batch} row{'s' if candidate.batch > 1 else ''}{steps}"
    return f"{rows}, recompute {candidate.recompute_text}, {candidate.optimizer}"


def make_plan(
    shape: ModelShape,
    gpu: Gpu,
    *,
    rows: int,
    seq: int,
    optimizers: Sequence[OptimizerBytes],
    batches: Sequence[int] | None = None,
    policies: Sequence[str] | None = None,
    host_bytes: int | None = None,
    eval_batch: int = 0,
    cuda_graphs: bool | None = None,
    streams: str | None = None,
) -> Plan:
    """The fastest step over `rows` rows of `seq` tokens that fits.

    Args:
        shape: The model, its quantization and its adapter.
        gpu: Where to.
        rows: Of a whole optimizer step; a microbatch takes a divisor of them.
        seq: Tokens of a row.
        optimizers: In the order in which they are wanted: a later one is for where nothing fits with those before.
        batches: Rows of a microbatch to choose from; None: every divisor.
        policies: Recomputation policies to choose from; None: all, and mixtures of two over the layers.
        host_bytes: Host memory that may be used; None: any.
        eval_batch: Rows of a batch of evaluation; 0: there is none.
        cuda_graphs: As the configuration has it.
        streams: Where the base streams from; None: it does not.
    """
    names = list(policies or POLICIES)
    sizes = [batch for batch in (batches or range(1, rows + 1)) if rows % batch == 0]
    tried: list[Candidate] = []
    chosen: Candidate | None = None
    for optimizer in optimizers:
        search = _Search(shape, gpu, rows, seq, optimizer, host_bytes, eval_batch, cuda_graphs, streams)
        found: list[Candidate] = []
        for batch in sizes:
            uniform = [search.candidate(batch, [name] * len(shape.blocks)) for name in names]
            found += [*uniform, *search.mixtures(uniform)]
        tried += found
        fitting = [one for one in found if search.fits(one)]
        # Of equally fast ones, the smaller.
        chosen = max(fitting, key=lambda one: (one.tokens_per_second, -one.footprint.peak_bytes), default=None)
        if chosen is not None:
            break
    faster = None
    if chosen is not None:
        ahead = [one for one in tried if one.tokens_per_second > chosen.tokens_per_second]
        unmixed = [one for one in ahead if len(set(one.policies)) == 1]
        faster = min(unmixed or ahead, key=lambda one: one.footprint.peak_bytes, default=None)
    smallest = min(tried, key=lambda one: one.footprint.peak_bytes)
    return Plan(gpu, seq, chosen, faster, None if chosen else smallest, len(tried), host_bytes)


@dataclass(frozen=True)
class _Search:
    shape: ModelShape
    gpu: Gpu
    rows: int
    seq: int
    optimizer: OptimizerBytes
    host_bytes: int | None
    eval_batch: int
    cuda_graphs: bool | None
    streams: str | None

    def fits(self, candidate: Candidate) -> bool:
        held = candidate.footprint
        has_host = self.host_bytes is None or held.host_bytes <= self.host_bytes
        return held.peak_bytes <= self.gpu.usable_bytes and has_host

    def candidate(self, batch: int, policies: Sequence[str]) -> Candidate:
        accumulation = self.rows // batch
        step = Step(
            batch,
            self.seq,
            policies,
            optimizer_bytes=self.optimizer.gpu,
            staging_bytes=self.optimizer.staging,
            host_optimizer_bytes=self.optimizer.host,
            cuda_graphs=self.cuda_graphs,
            streams=self.streams,
            eval_batch=self.eval_batch,
        )
        seconds = accumulation * step_seconds(
            self.shape, self.gpu, batch, self.seq, policies, streams=self.streams is not None
        )
        tokens = self.rows * self.seq
        held = footprint(self.shape, step)
        return Candidate(batch, accumulation, tuple(policies), self.optimizer.name, seconds, tokens / seconds, held)

    def mixtures(self, uniform: Sequence[Candidate]) -> Iterator[Candidate]:
        """For each policy that fits and each faster one that does not: as many layers of the faster as fit.

        Args:
            uniform: Candidates of one microbatch, each with one policy for all layers.
        """
        layers = len(self.shape.blocks)
        fits = [one for one in uniform if self.fits(one)]
        for slow, fast in itertools.product(fits, uniform):
            if fast in fits or fast.tokens_per_second <= slow.tokens_per_second:
                continue
            if POLICIES[slow.policies[0]].offload != POLICIES[fast.policies[0]].offload:
                # One layer that offloads takes CUDA graphs from all.
                continue
            few, many = 0, layers
            best = None
            while many - few > 1:
                count = (few + many) // 2
                mixed = self.candidate(slow.batch, [slow.policies[0]] * (layers - count) + [fast.policies[0]] * count)
                if self.fits(mixed):
                    few, best = count, mixed
                else:
                    many = count
            if best is not None:
                yield best
