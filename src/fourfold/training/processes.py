"""The processes of a run: which of them this is, and how they come together."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, distributed, nn

from fourfold.errors import ConfigError
from fourfold.quantization.linear import QuantizedWeight

__all__ = ["Agreement", "Processes", "follow_main", "join", "processes", "sides", "smallest", "summed"]


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
    """What the environment says, by torchrun's names; one process where it says nothing.

    Raises:
        ConfigError: It says something that is no number.
    """
    names = {"rank": "RANK", "local_rank": "LOCAL_RANK", "count": "WORLD_SIZE", "local_count": "LOCAL_WORLD_SIZE"}
    try:
        return Processes(**{key: int(os.environ[name]) for key, name in names.items() if name in os.environ})
    except ValueError as error:
        raise ConfigError(
            "the environment does not say which process this is", found=error, hint="start the run with torchrun"
        ) from error


def join(device: str, timeout: int) -> Processes:
    """Bring the processes together, each with the GPU of its number; nothing where there is one.

    Args:
        device: The configuration's: "auto", or "cpu", where they talk by gloo.
        timeout: Seconds that a process waits for the others in a collective.

    Raises:
        ConfigError: Fewer GPUs here than processes, or a GPU that is named, which all would take.
    """
    own = processes()
    if not own.are_several:
        return own
    if device not in ("auto", "cpu"):
        raise ConfigError(
            "device names one GPU, and each process takes one of its own",
            found=f"device: {device}, {own.count} processes",
            allowed="device: auto, or cpu",
            hint="CUDA_VISIBLE_DEVICES says which GPUs a run may take",
        )
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    options: dict[str, Any] = {"timeout": timedelta(seconds=timeout)}
    if not on_cpu:
        there = torch.cuda.device_count()
        if own.local_rank >= there:
            raise ConfigError(
                "there are fewer GPUs than processes on this machine",
                found=f"{there} GPUs, {own.local_count} processes",
                hint="give torchrun --nproc-per-node the number of GPUs",
            )
        torch.cuda.set_device(own.local_rank)
        # So that NCCL knows it, before the first collective.
        options["device_id"] = torch.device("cuda", own.local_rank)
    PartialState(cpu=on_cpu, **options)
    return own


def _is_joined() -> bool:
    return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1


def sides(own: Any) -> list[Any]:
    """What each process gives here, by rank; all of them call this together."""
    if not _is_joined():
        return [own]
    given: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(given, own)
    return given


def smallest(value: int | None) -> int | None:
    """The smallest that any process has, for decisions that all must take alike; None where it is known to none."""
    return min((each for each in sides(value) if each is not None), default=None)


def summed(values: Tensor) -> Tensor:
    """`values` summed over all processes, in place. The host does not wait."""
    if _is_joined():
        distributed.all_reduce(values)
    return values


def follow_main(model: nn.Module, *, with_codes: bool = True) -> None:
    """Give all processes, which hold the model whole, the main one's adapters and quantized weights.

    What they computed each for themselves may differ in the last bits, and then goes apart.

    Args:
        with_codes: False: the codes are the same already.
    """
    if not _is_joined():
        return

    def send(tensor: Tensor) -> Tensor:
        if tensor.numel():
            distributed.broadcast(tensor, src=0)
        return tensor

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                send(parameter.data)
        for module in model.modules():
            if isinstance(module, QuantizedWeight) and module.scales is not None:
                module.scales.map_tensors(send)
                if with_codes:
                    send(module.weight.data)


class Agreement:
    """A number above 0 that any process may have, made known to all at the same place of the run.

    On a GPU it is known one call later, so that no step waits for it.

    Args:
        device: Where collectives work.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._sent: tuple[Tensor, torch.cuda.Event] | None = None

    def largest(self, own: int, *, now: bool = False) -> int:
        """The largest number of all processes, which call this together; `now`: without the delay."""
        if not _is_joined():
            return own
        # Filled there: a copy from the host would wait for all that is queued.
        value = torch.full((), own, dtype=torch.int64, device=self._device)
        distributed.all_reduce(value, op=distributed.ReduceOp.MAX)
        if now or not value.is_cuda:
            return int(value)
        before, host = self._sent, torch.empty((), dtype=value.dtype, pin_memory=True)
        host.copy_(value, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self._sent = host, arrived
        if before is None:
            return 0
        before[1].synchronize()
        return int(before[0])
