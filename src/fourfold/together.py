"""A verb that several processes run together: they come together before it, and none goes on when one has failed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from fourfold.config import RunConfig
from fourfold.errors import ConfigError
from fourfold.memory.gpus import Gpu
from fourfold.training.lifeline import Lifeline
from fourfold.training.processes import Processes, join, sides, smallest

__all__ = ["least_of_all", "require_alike", "together"]


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
    else:
        lifeline.close()
    finally:
        lifeline.stop()


def least_of_all(own: Processes, gpu: Gpu | None, host_bytes: int | None) -> tuple[Gpu | None, int | None]:
    """The GPU, and the host memory of all processes together, that all plan with alike: as if each had what the one has
    that has least left."""
    if not own.are_several:
        return gpu, host_bytes
    usable, least = smallest(None if gpu is None else gpu.usable_bytes), smallest(host_bytes)
    if gpu is not None and usable is not None:
        gpu = gpu.with_usable(usable)
    return gpu, None if least is None else least * own.count // own.local_count


def require_alike(what: str, found: object) -> None:
    """Raises ConfigError where processes on several machines do not see the same."""
    seen = sides(str(found))
    if len(set(seen)) > 1:
        raise ConfigError(
            f"the processes do not find the same: {what}",
            found="; ".join(f"rank {rank}: {each}" for rank, each in enumerate(seen)),
            hint="output_dir must lie where all machines see it",
        )
