"""Several processes in one run: who they are, how they share the model, and what each must not do alone.

torchrun, accelerate or SLURM start the processes and name them in the environment; accelerate's `PartialState` joins
them into one group, and the Trainer finds that. A run of one process is the same code with nothing to share.

How a model is shared is a row of `DISTRIBUTED`. A row says three things:

- `arguments`: fields of the Trainer's arguments (`ddp_...`, `deepspeed`), for what the Trainer and accelerate do by
  themselves when they prepare the model.
- `shard`: what is done to the adapted model before the trainer is made, for what they cannot do.
- `state`: how weights and optimizer state are made whole for a checkpoint, and parted again, so that what is saved
  does not depend on the number of processes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from fourfold.errors import ConfigError

__all__ = ["DISTRIBUTED", "DistributedRow", "Processes", "WholeState", "distributed_row", "processes"]


@dataclass(frozen=True)
class Processes:
    """This process among those of the run.

    Attributes:
        rank: Its number; 0 is the main process, the only one that writes and tells.
        local_rank: Its number on this machine, and that of its GPU.
        count: How many there are.
        local_count: How many of them are on this machine.
    """

    rank: int = 0
    local_rank: int = 0
    count: int = 1
    local_count: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def are_several(self) -> bool:
        return self.count > 1


def processes() -> Processes:
    """What the environment says, by torchrun's names; one process where it says nothing."""
    names = {"rank": "RANK", "local_rank": "LOCAL_RANK", "count": "WORLD_SIZE", "local_count": "LOCAL_WORLD_SIZE"}
    try:
        return Processes(**{key: int(os.environ[name]) for key, name in names.items() if name in os.environ})
    except ValueError as error:
        raise ConfigError(
            "the environment does not say which process this is", found=error, hint="start the run with torchrun"
        ) from error


class WholeState:
    """Weights and optimizer state as a checkpoint holds them, where each process has them whole: one, and DDP.

    All processes call each method, together. What is returned counts on the main process alone.
    """

    def weights(self, model: nn.Module) -> dict[str, torch.Tensor] | None:
        """The `state_dict` for `model.save_pretrained`; None: the model's own."""
        return None

    def shapes(self, model: nn.Module) -> dict[str, torch.Size]:
        """Name and shape of each trained parameter, in the optimizer's order."""
        return {name: value.shape for name, value in model.named_parameters() if value.requires_grad}

    def optimizer(self, optimizer: Any, model: nn.Module) -> dict[str, Any]:
        """The optimizer's `state_dict`, with the state of whole parameters."""
        state: dict[str, Any] = optimizer.state_dict()
        return state

    def load_optimizer(self, optimizer: Any, model: nn.Module, state: dict[str, Any]) -> None:
        """Give the optimizer what `optimizer` returned, tensors on the CPU."""
        optimizer.load_state_dict(state)

    def head(self, lm_head: nn.Module) -> AbstractContextManager[nn.Module]:
        """The output layer, whole within: what the loss multiplies with."""
        return nullcontext(lm_head)


class DistributedRow(NamedTuple):
    """A way in which processes share a run.

    Attributes:
        arguments: Fields of TRL's SFTConfig.
        shard: What is done to the model, adapters on it, on the device given: in place, before the trainer is made.
        loads_on: Where the base is loaded to before that; None: the process's device.
        state: See `WholeState`.
        is_sharded: Whether a process has but a part of the weights, so that none computes alone.
        zero_stage: Of DeepSpeed, which prepares the model, steps and clips then; None: it does not.
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


# DeepSpeed is imported by its rows alone, where one is used.
def _zero_state() -> WholeState:
    from fourfold.training.zero import ZeroState

    return ZeroState()


def _prepare_for_zero(model: nn.Module, device: torch.device) -> None:
    from fourfold.training.zero import prepare_for_zero

    prepare_for_zero(model)


def _prepare_for_zero3(model: nn.Module, device: torch.device) -> None:
    from fourfold.training.zero import prepare_for_zero3

    prepare_for_zero3(model)


# `distributed` -> how. "auto" is the first.
DISTRIBUTED: dict[str, DistributedRow] = {
    "ddp": _DDP,
    "fsdp2": DistributedRow(loads_on="cpu", is_sharded=True),
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
