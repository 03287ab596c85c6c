"""The search for the fastest way to train that fits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from fourfold.errors import ConfigError
from fourfold.memory.footprint import Footprint, Step, footprint
from fourfold.memory.gpus import Gpu
from fourfold.memory.parallel import ONE_GPU, Parallelism
from fourfold.memory.plan import Candidate, OptimizerBytes, Plan
from fourfold.memory.speed import (
    host_update_seconds,
    pipeline_seconds,
    reduction_seconds,
    step_seconds,
    update_seconds,
)
from fourfold.memory.stages import first_layers, in_flight, stages
from fourfold.memory.traffic import between_stages, traffic
from fourfold.models.model_shape import ModelShape

__all__ = ["TIE", "Candidate", "OptimizerBytes", "Plan", "fastest_of", "make_plan"]

# Speeds that differ by less are alike: predictions are no better, and what is simpler or more exact is worth it.
TIE = 0.005


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
    parallelisms: Sequence[Parallelism] = (ONE_GPU,),
) -> Plan:
    """The fastest step over `rows` rows of `seq` tokens that fits.

    Args:
        shape: The model, its quantization, and what of it is trained; where GPUs divide tensors, one GPU's part of it.
        gpu: Where to; of several, each.
        rows: Of a whole optimizer step; GPUs take equal parts of them, unless they divide tensors or layers, and a
            microbatch takes a divisor of a part.
        seq: Tokens of a row.
        optimizers: To choose from; of those that are as fast as another but for `TIE`, the first.
        batches: Rows of a microbatch to choose from; None: every divisor.
        policies: Recomputation policies to choose from; None: all that layers can have. Of fused blocks also mixtures
            of two over the layers.
        host_bytes: Host memory that may be used by all GPUs' processes; None: any.
        eval_batch: Rows of a batch of evaluation; 0: there is none.
        cuda_graphs: As the configuration has it.
        streams: Where the base streams from; None: it does not.
        parallelisms: How GPUs may share the run; of equally fast ones the first.

    Raises:
        ConfigError: The rows cannot be parted among the GPUs, nor the layers; or a base that streams, and several.
    """
    plan = Plan(gpu, seq, None, None, None, 0, host_bytes)
    graphs = cuda_graphs if shape.is_fused else False
    step = Step(0, seq, (), cuda_graphs=graphs, streams=streams, eval_batch=eval_batch)
    num_gpus = max(way.num_gpus for way in parallelisms)
    if streams and num_gpus > 1:
        raise ConfigError(
            "a base that streams belongs to one GPU",
            found=f"stream_base: {streams}, {num_gpus} GPUs",
            hint="leave stream_base out, and give distributed: fsdp2; or plan for one GPU",
        )
    known: dict[Any, float] = {}
    ways = [
        _Way(shape, gpu, rows, step, optimizer, parallelism, known)
        for optimizer in optimizers
        for parallelism in parallelisms
        if _suits(optimizer, parallelism)
    ]
    if not ways:
        raise ConfigError(
            "this optimizer's state cannot be shared so",
            found=", ".join(optimizer.name for optimizer in optimizers),
            allowed=sorted({name for way in parallelisms for name in way.shards.optimizers or ()}),
        )
    uniform = {
        (way, batch): [way.candidate(batch, [name] * len(shape.blocks)) for name in policies or shape.policies]
        for way in ways
        for batch in way.batches(batches)
    }
    tried = [candidate for candidates in uniform.values() for candidate in candidates]
    num_tried = len(tried)
    fitting = [candidate for candidate in tried if plan.fits(candidate)]
    # From the fastest that a mixture could come near to: what cannot win is not looked into.
    pairs = [
        (way, *pair)
        for (way, _), candidates in uniform.items()
        for pair in itertools.permutations(candidates, 2)
        if shape.is_fused and _mixes(*pair)
    ]
    top = max((candidate.tokens_per_second for candidate in fitting), default=0.0)
    for way, slow, fast in sorted(pairs, key=lambda pair: -pair[2].tokens_per_second):
        if fast.tokens_per_second < top * (1 - TIE):
            break
        for mixed in way.mixture(slow, fast, [plan.shortage, plan.host_shortage]):
            num_tried += 1
            if plan.fits(mixed):
                fitting.append(mixed)
                top = max(top, mixed.tokens_per_second)
    order = {(way.optimizer.name, way.parallelism): number for number, way in enumerate(ways)}
    alike = [candidate for candidate in fitting if candidate.tokens_per_second >= top * (1 - TIE)]
    # Of equally fast ones with the same optimizer, the smaller.
    chosen = min(
        alike,
        key=lambda one: (
            order[one.optimizer, one.parallelism],
            -one.tokens_per_second,
            one.footprint.peak_bytes,
            one.host_bytes,
        ),
        default=None,
    )
    smallest = min(tried, key=lambda one: _shortage(plan, one))
    return replace(
        plan,
        chosen=chosen,
        faster=None if chosen is None else _next_faster(plan, chosen, tried),
        smallest=None if chosen else smallest,
        num_tried=num_tried,
    )


def fastest_of(plans: Mapping[str, Plan], refused: Mapping[str, str]) -> Plan:
    """Of plans by strategy the one with the fastest way that fits, of equally fast ones the first; all are kept in it.

    Args:
        plans: In the order of preference. Those of strategies that are forecasts only are chosen where there are no
            others.
        refused: Why there is no plan of a strategy.
    """
    run = {name: plan for name, plan in plans.items() if plan.not_run is None} or dict(plans)
    fitting = [plan for plan in run.values() if plan.chosen is not None]
    top = max((plan.chosen.tokens_per_second for plan in fitting if plan.chosen), default=0.0)
    best = next((one for one in fitting if one.chosen and one.chosen.tokens_per_second >= top * (1 - TIE)), None)
    if best is None:
        best = min(run.values(), key=lambda plan: _shortage(plan, plan.smallest))
        faster = None
    else:
        others = [one for plan in run.values() for one in (plan.faster, plan.smallest) if one is not None]
        assert best.chosen is not None
        faster = _next_faster(best, best.chosen, others)
    num_tried = sum(plan.num_tried for plan in plans.values())
    return replace(best, faster=faster, num_tried=num_tried, by_strategy=dict(plans), refused=dict(refused))


def _shortage(plan: Plan, candidate: Candidate | None) -> tuple[int, int, int]:
    assert candidate is not None
    return plan.shortage(candidate), plan.host_shortage(candidate), candidate.footprint.peak_bytes


def _suits(optimizer: OptimizerBytes, parallelism: Parallelism) -> bool:
    known = parallelism.shards.optimizers
    return known is None or optimizer.name in known


def _mixes(slow: Candidate, fast: Candidate) -> bool:
    """Whether layers of both policies are worth a try: one that offloads takes CUDA graphs from all."""
    return fast.tokens_per_second >= slow.tokens_per_second and slow.runs_by_graphs == fast.runs_by_graphs


def _next_faster(plan: Plan, chosen: Candidate, tried: Sequence[Candidate]) -> Candidate | None:
    least = chosen.tokens_per_second * (1 + TIE)
    ahead = [one for one in tried if one.tokens_per_second > least and not plan.fits(one)]
    return min(ahead, key=lambda one: (plan.shortage(one), plan.host_shortage(one)), default=None)


@dataclass(frozen=True, eq=False)
class _Way:
    """What is the same for all microbatches and policies.

    Args:
        step: What is asked of every step.
        known: Seconds of microbatches that were looked at already, whatever the optimizer.
    """

    shape: ModelShape
    gpu: Gpu
    rows: int
    step: Step
    optimizer: OptimizerBytes
    parallelism: Parallelism
    known: dict[Any, float] = field(default_factory=dict)

    @cached_property
    def parts(self) -> list[ModelShape]:
        """The model of each stage of a pipeline, or all of it."""
        return stages(self.shape, self.parallelism.num_stages)

    @cached_property
    def _bounds(self) -> list[tuple[int, int]]:
        """The layers of each part."""
        return list(itertools.pairwise(first_layers(len(self.shape.blocks), len(self.parts))))

    def batches(self, wanted: Sequence[int] | None) -> list[int]:
        """Rows of a microbatch: divisors of what a GPU gets of a step."""
        groups = self.parallelism.row_groups
        if self.rows % groups:
            raise ConfigError(
                "the rows of a step cannot be parted among the GPUs",
                found=f"{self.rows} rows, {groups} GPUs",
                allowed=f"a multiple of {groups} rows",
                hint="set gradient_accumulation_steps or per_device_train_batch_size accordingly",
            )
        each = self.rows // groups
        return [batch for batch in (wanted or range(1, each + 1)) if each % batch == 0]

    def candidate(self, batch: int, policies: Sequence[str]) -> Candidate:
        shape, parallelism, policies = self.shape, self.parallelism, tuple(policies)
        accumulation = self.rows // parallelism.row_groups // batch
        step = replace(self.step, batch=batch, policies=policies, accumulation=accumulation, parallelism=parallelism)
        stage, held = self._largest(step)
        seconds = self._seconds(step)
        return Candidate(
            batch=batch,
            accumulation=accumulation,
            policies=policies,
            optimizer=self.optimizer.name,
            seconds=seconds,
            tokens_per_second=self.rows * step.seq / seconds,
            footprint=held,
            runs_by_graphs=step.runs_by_graphs,
            parallelism=parallelism,
            traffic=traffic(shape, parallelism, batch, step.seq, policies, accumulation),
            stage=stage if parallelism.num_stages > 1 else None,
        )

    def _largest(self, step: Step) -> tuple[int, Footprint]:
        """The stage that takes the most, and what it takes."""
        held = []
        for number, (part, (first, last)) in enumerate(zip(self.parts, self._bounds, strict=True)):
            waiting = in_flight(number, len(self.parts), step.accumulation) - 1
            own = replace(self._with_optimizer(step, part), policies=step.policies[first:last], waiting=waiting)
            held.append(footprint(part, own))
        stage = max(range(len(held)), key=lambda number: held[number].peak_bytes)
        return stage, held[stage]

    def _with_optimizer(self, step: Step, part: ModelShape) -> Step:
        """With the state of what a part of the model trains, or of a GPU's share of it."""
        optimizer, parallelism = self.optimizer, self.parallelism
        resident, paged = self._state(part)
        if parallelism.offloads_optimizer:
            resident, paged = 0, resident + paged
        return replace(
            step,
            optimizer_bytes=resident,
            staging_bytes=0 if parallelism.offloads_optimizer else optimizer.staging,
            host_optimizer_bytes=paged,
            update_bytes=optimizer.working,
        )

    def _state(self, part: ModelShape) -> tuple[int, int]:
        """Bytes of it, on the GPU and paged."""
        whole = self.shape.gradient_bytes
        sizes = (size * part.gradient_bytes // max(1, whole) for size in (self.optimizer.gpu, self.optimizer.host))
        resident, paged = (self.parallelism.share(size, self.parallelism.shards.optimizer) for size in sizes)
        return resident, paged

    def _seconds(self, step: Step) -> float:
        gpu, parallelism, trained = self.gpu, self.parallelism, self.shape.gradient_bytes
        microbatch = max(self._microbatch(number, step) for number in range(len(self.parts)))
        if parallelism.num_stages > 1:
            passed = between_stages(self.shape, parallelism, step.tokens)
            seconds = pipeline_seconds(gpu, microbatch, passed, parallelism.num_stages, step.accumulation)
            largest = max(self.parts, key=lambda part: part.gradient_bytes)
            resident, paged = self._state(largest)
            return seconds + update_seconds(gpu, largest.gradient_bytes, resident + paged, paged)
        seconds = step.accumulation * microbatch + reduction_seconds(gpu, trained, parallelism, microbatch)
        if parallelism.offloads_optimizer:
            return seconds + host_update_seconds(gpu, self.shape.num_adapter, trained, parallelism.num_gpus)
        resident, paged = self._state(self.shape)
        copies = parallelism.copy_bytes(self.shape.num_adapter)
        own = parallelism.share(trained, parallelism.shards.optimizer)
        return seconds + update_seconds(gpu, own, resident + paged + copies, paged)

    def _microbatch(self, number: int, step: Step) -> float:
        """Seconds of one, on a stage."""
        key = (number, self.parallelism, step.batch, step.policies)
        if key not in self.known:
            self.known[key] = step_seconds(
                self.parts[number],
                self.gpu,
                step.batch,
                step.seq,
                step.policies[slice(*self._bounds[number])],
                streams=step.streams is not None,
                by_graphs=step.runs_by_graphs,
                parallelism=self.parallelism,
            )
        return self.known[key]

    def mixture(
        self, slow: Candidate, fast: Candidate, shortages: Sequence[Callable[[Candidate], int]]
    ) -> Iterator[Candidate]:
        """As many layers of the faster policy as there is memory for: none where all fit, or where one is too many.

        Args:
            slow, fast: With one policy each for all layers of the same microbatch.
            shortages: Bytes by which a candidate does not fit the GPU, and the host. Either grows or shrinks with the
                number of layers of the faster policy; where it shrinks, most of them are best for it as well.
        """
        grows = [shortage for shortage in shortages if shortage(fast)]
        if not grows or any(shortage(slow) for shortage in grows):
            return
        few, many = 0, len(slow.policies)
        best = None
        while many - few > 1:
            count = (few + many) // 2
            mixed = self.candidate(slow.batch, [*slow.policies[count:], *fast.policies[:count]])
            if any(shortage(mixed) for shortage in grows):
                many = count
            else:
                few, best = count, mixed
        if best is not None:
            yield best
