"""How several processes share a run, a row for each way.

torchrun, accelerate or SLURM start the processes and name them in the environment (`processes`); accelerate's
`PartialState` joins them into one group, and the Trainer finds that. A run of one process is the same code with nothing
to share. A row of `DISTRIBUTED` says three things:

- `arguments`: fields of the Trainer's arguments (`ddp_...`, `deepspeed`), for what the Trainer and accelerate do by
  themselves when they prepare the model.
- `shard`: what is done to the adapted model before the trainer is made, for what they cannot do.
- `state`: how weights and optimizer state are made whole for a checkpoint, and parted again, so that what is saved
  does not depend on the number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from fourfold.errors import ConfigError
from fourfold.models.sharding import shard_model
from fourfold.training.fsdp import ShardedState
from fourfold.training.processes import Processes, processes
from fourfold.training.whole_state import WholeState

__all__ = ["DISTRIBUTED", "DistributedRow", "Processes", "WholeState", "distributed_row", "processes"]


class DistributedRow(NamedTuple):
    """A way in which processes share a run.

    Attributes:
        arguments: Fields of TRL's SFTConfig.
        shard: What is done to the model, adapters on it, on the device given: in place, before the trainer is made.
            accelerate is told that the model is prepared then, unless DeepSpeed is to do it.
        loads_on: Where the base is loaded to before that; None: the process's device.
        state: See `WholeState`.
        is_sharded: Whether a process has but a part of the weights, so that none computes alone.
        zero_stage: Of DeepSpeed, which prepares the model after that, clips and steps; None: it does not.
    """

    arguments: Mapping[str, Any] = {}
    shard: Callable[[nn.Module, torch.device], None] | None = None
    loads_on: str | None = None
    state: Callable[[], WholeState] = WholeState
    is_sharded: bool = False
    zero_stage: int | None = None


# Each process has the whole model; gradients are averaged. Adapters' gradients are few: they go in one bucket, and no
# buffer of a model of Transformers changes.
_DDP = DistributedRow(arguments={"ddp_find_unused_parameters": False, "ddp_broadcast_buffers": False})


# DeepSpeed is imported where its rows are used, and nowhere else.
def _zero_state() -> WholeState:
    from fourfold.training.zero import ZeroState

    return ZeroState()


def _prepare_for_zero(model: nn.Module, device: torch.device) -> None:
    from fourfold.training.zero import prepare_for_zero

    prepare_for_zero(model)


def _prepare_for_zero3(model: nn.Module, device: torch.device) -> None:
    from fourfold.training.zero import prepare_for_zero3

    prepare_for_zero3(model, device)


# `distributed` -> how. "auto" is the first.
DISTRIBUTED: dict[str, DistributedRow] = {
    "ddp": _DDP,
    "fsdp2": DistributedRow(shard=shard_model, loads_on="cpu", state=ShardedState, is_sharded=True),
    "zero1": DistributedRow(shard=_prepare_for_zero, state=_zero_state, zero_stage=1),
    "zero2": DistributedRow(shard=_prepare_for_zero, state=_zero_state, zero_stage=2),
    "zero3": DistributedRow(shard=_prepare_for_zero3, state=_zero_state, is_sharded=True, zero_stage=3),
}


def distributed_row(name: str, count: int) -> DistributedRow:
    """The row of `distributed: name` for so many processes; one process shares nothing.

    Raises:
        ConfigError: An unknown name.
    """
    if name != "auto" and name not in DISTRIBUTED:
        raise ConfigError("distributed is not known", found=repr(name), allowed=["auto", *DISTRIBUTED])
    return _DDP if name == "auto" or count == 1 else DISTRIBUTED[name]
