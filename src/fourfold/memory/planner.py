"""The search for the fastest way to train that fits."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from fourfold.errors import ConfigError
from fourfold.memory.footprint import Step, footprint
from fourfold.memory.gpus import Gpu
from fourfold.memory.parallel import ONE_GPU, Parallelism
from fourfold.memory.plan import Candidate, OptimizerBytes, Plan
from fourfold.memory.speed import reduction_seconds, step_seconds, update_seconds
from fourfold.models.model_shape import ModelShape

__all__ = ["TIE", "Candidate", "OptimizerBytes", "Plan", "make_plan"]

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
        shape: The model, its quantization, and what of it is trained.
        gpu: Where to; of several, each.
        rows: Of a whole optimizer step; GPUs take equal parts of them, and a microbatch takes a divisor of a part.
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
        ConfigError: The rows cannot be parted among the GPUs.
    """
    plan = Plan(gpu, seq, None, None, None, 0, host_bytes)
    graphs = cuda_graphs if shape.is_fused else False
    step = Step(0, seq, (), cuda_graphs=graphs, streams=streams, eval_batch=eval_batch)
    ways = [
        _Way(shape, gpu, rows, step, optimizer, parallelism)
        for optimizer in optimizers
        for parallelism in parallelisms
        if streams is None or not parallelism.shards.weights
    ]
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
    smallest = min(tried, key=lambda one: (plan.shortage(one), plan.host_shortage(one), one.footprint.peak_bytes))
    return replace(
        plan,
        chosen=chosen,
        faster=None if chosen is None else _next_faster(plan, chosen, tried),
        smallest=None if chosen else smallest,
        num_tried=num_tried,
    )


def _mixes(slow: Candidate, fast: Candidate) -> bool:
    """Whether layers of both policies are worth a try: one that offloads takes CUDA graphs from all."""
    return fast.tokens_per_second >= slow.tokens_per_second and slow.runs_by_graphs == fast.runs_by_graphs


def _next_faster(plan: Plan, chosen: Candidate, tried: Sequence[Candidate]) -> Candidate | None:
    least = chosen.tokens_per_second * (1 + TIE)
    ahead = [one for one in tried if one.tokens_per_second > least and not plan.fits(one)]
    return min(ahead, key=lambda one: (plan.shortage(one), plan.host_shortage(one)), default=None)


@dataclass(frozen=True)
class _Way:
    """What is the same for all microbatches and policies.

    Args:
        step: What is asked of every step.
    """

    shape: ModelShape
    gpu: Gpu
    rows: int
    step: Step
    optimizer: OptimizerBytes
    parallelism: Parallelism

    def batches(self, wanted: Sequence[int] | None) -> list[int]:
        """Rows of a microbatch: divisors of what a GPU gets of a step."""
        num_gpus = self.parallelism.num_gpus
        if self.rows % num_gpus:
            raise ConfigError(
                "the rows of a step cannot be parted among the GPUs",
                found=f"{self.rows} rows, {num_gpus} GPUs",
                allowed=f"a multiple of {num_gpus} rows",
                hint="set gradient_accumulation_steps or per_device_train_batch_size accordingly",
            )
        each = self.rows // num_gpus
        return [batch for batch in (wanted or range(1, each + 1)) if each % batch == 0]

    def candidate(self, batch: int, policies: Sequence[str]) -> Candidate:
        shape, gpu, parallelism, optimizer = self.shape, self.gpu, self.parallelism, self.optimizer
        accumulation = self.rows // parallelism.num_gpus // batch
        is_sharded = parallelism.shards.optimizer
        resident, paged = (parallelism.share(size, is_sharded) for size in (optimizer.gpu, optimizer.host))
        step = replace(
            self.step,
            batch=batch,
            policies=policies,
            optimizer_bytes=resident,
            staging_bytes=optimizer.staging,
            host_optimizer_bytes=paged,
            accumulation=accumulation,
            update_bytes=optimizer.working,
            parallelism=parallelism,
        )
        by_graphs = step.runs_by_graphs
        options = {"streams": step.streams is not None, "by_graphs": by_graphs}
        microbatch = step_seconds(shape, gpu, batch, step.seq, policies, **options, parallelism=parallelism)
        trained = shape.gradient_bytes
        seconds = accumulation * microbatch + reduction_seconds(gpu, trained, parallelism, microbatch)
        seconds += update_seconds(gpu, parallelism.share(trained, is_sharded), resident + paged, paged)
        return Candidate(
            batch=batch,
            accumulation=accumulation,
            policies=tuple(policies),
            optimizer=optimizer.name,
            seconds=seconds,
            tokens_per_second=self.rows * step.seq / seconds,
            footprint=footprint(shape, step),
            runs_by_graphs=by_graphs,
            parallelism=parallelism,
            traffic_bytes=parallelism.traffic_bytes(sum(shape.weights_of_layers), trained, accumulation),
        )

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
