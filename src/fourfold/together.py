"""A verb that several processes run together: they come together before it, and none goes on when one has failed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from fourfold.config import RunConfig
from fourfold.config import options as choices
from fourfold.errors import ConfigError
from fourfold.kernels.host_memory import spare_bytes
from fourfold.memory.gpus import Gpu, gpu_present
from fourfold.memory.planner import Plan
from fourfold.planning import parallelism_in_force, plan_for_training
from fourfold.training.lifeline import Lifeline
from fourfold.training.processes import Processes, join, sides, smallest

__all__ = ["planned_together", "require_alike", "together"]


@contextlib.contextmanager
def together(config: RunConfig) -> Iterator[Lifeline]:
    """Join the processes that torchrun or accelerate started; nothing where there is one.

    Raises:
        ConfigError: See `join`; or a base that streams, and several processes.
        TrainingError: Another process failed or died, which is named.
    """
    lifeline = Lifeline(join(config.device, config.ddp_timeout))
    if lifeline.own.are_several and config.stream_base is not None:
        raise ConfigError(
            "a base that streams belongs to one GPU",
            found=f"stream_base: {config.stream_base}, {lifeline.own.count} processes",
            hint="leave stream_base out, and give distributed: fsdp2",
        )
    lifeline.start()
    try:
        yield lifeline
    except Exception as error:
        instead = lifeline.failed(error)
        if instead is None:
            raise
        raise instead from error
    lifeline.close()


def planned_together(config: RunConfig, device: torch.device, own: Processes) -> tuple[Gpu | None, Plan | None]:
    """The GPU of this process, and the plan that all keep to alike: of the GPU that has least left.

    Raises:
        TrainingError: Nothing fits.
    """
    gpu = gpu_present(device, choices.memory_limit(config)) if device.type == "cuda" else None
    host = spare_bytes()
    if not own.are_several:
        return gpu, plan_for_training(config, gpu, host)
    usable, least = smallest(None if gpu is None else gpu.usable_bytes), smallest(host)
    if gpu is not None and usable is not None:
        gpu = gpu.with_usable(usable)
    # What a machine has is its processes'; a plan's is that of all of them.
    host = None if least is None else least * own.count // own.local_count
    return gpu, plan_for_training(config, gpu, host, parallelism_in_force(config, own.count))


def require_alike(what: str, found: object) -> None:
    """Raises ConfigError where processes on several machines do not see the same."""
    seen = sides(str(found))
    if len(set(seen)) > 1:
        raise ConfigError(
            f"the processes do not find the same: {what}",
            found="; ".join(f"rank {rank}: {each}" for rank, each in enumerate(seen)),
            hint="output_dir must lie where all machines see it",
        )
