"""What our optimizers share: state laid out at the first use, one call for all parameters, checkpoints of its views."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, distributed
from torch.optim import Optimizer

from fourfold.errors import CheckpointError, ConfigError
from fourfold.kernels.shards import group_of, local_part

__all__ = ["OwnOptimizer", "State"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class State(Protocol):
    """What `OwnOptimizer` asks of the state of all parameters.

    Attributes:
        params: The parameters, in an order of its own.
        norm: Norm of all gradients of the last step before clipping, fp32 scalar.
        scale: What the last step's gradients were multiplied by, fp32 scalar; -1 where the step changed nothing.
    """

    @property
    def params(self) -> list[Tensor]: ...
    @property
    def norm(self) -> Tensor: ...
    @property
    def scale(self) -> Tensor: ...

    def views(self, index: int) -> dict[str, Tensor]:
        """The state of one parameter, by the names of its `state_dict`."""

    def settle(self) -> None:
        """Wait until views may be read and written."""


class OwnOptimizer(Optimizer, ABC):
    """An optimizer that updates all parameters in one call, clips inside it and does not wait for the device.

    A step whose gradients' norm, or `watched_loss`, is not finite changes neither parameters nor state.

    Of parameters that processes share (FSDP2's), each updates its part, by the norm of all of them; its state, and so
    its `state_dict`, is that of the part.

    Args:
        params: Parameters or groups of them, all on one device: contiguous, fp32, bf16 or fp16.
        defaults: Hyperparameters of a group that does not have its own.
        max_grad_norm: Gradients are clipped to this norm, all together, inside `step`; None or 0: never. `.grad` itself
            is left as it is.

    Attributes:
        watched_loss: fp32 scalar on the parameters' device, or None: see above.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], max_grad_norm: float | None) -> None:
        holds = max_grad_norm is None or max_grad_norm >= 0
        self._require("max_grad_norm", max_grad_norm, holds, "0 or more, or None")
        super().__init__(params, defaults)
        self.max_grad_norm = max_grad_norm
        self.watched_loss: Tensor | None = None
        self._laid_out: State | None = None
        self._owners: dict[int, Tensor] = {}
        self._group: distributed.ProcessGroup | None = None

    def _require(self, key: str, value: object, holds: bool, allowed: str) -> None:
        if not holds:
            raise ConfigError(f"{type(self).__name__}: {key} is out of range", found=value, allowed=allowed)

    @abstractmethod
    def _lay_out(self, params: Sequence[tuple[Tensor, int]]) -> State:
        """The state of parameters, each with the number of its group, before their first step; of those that are
        shared, this process's parts, whose `owner` is the whole."""

    @abstractmethod
    def _update(self, grads: Sequence[Tensor | None]) -> None:
        """One step, with the gradients of the state's parameters, in its order."""

    def owner(self, part: Tensor) -> Tensor:
        """The parameter that a tensor of the state's `params` is, or is a part of."""
        return self._owners[id(part)]

    @property
    def grad_norm(self) -> Tensor:
        """Norm of all gradients of the last step before clipping: fp32 scalar on the device, the same tensor always."""
        return self._flat().norm

    @property
    def grad_scale(self) -> Tensor:
        """What clipping multiplied them by: fp32 scalar on the device; -1 where the last step changed nothing."""
        return self._flat().scale

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        if getattr(self, "_laid_out", None) is not None:
            raise ConfigError(
                f"{type(self).__name__} takes no new parameters once its state is laid out", hint="make a new one"
            )

    def _flat(self) -> State:
        # At the first use, not when constructed: until then a model may be moved to another device.
        if self._laid_out is None:
            name = type(self).__name__
            params = list[tuple[Tensor, int]]()
            for number, group in enumerate(self.param_groups):
                for param in group["params"]:
                    part = local_part(param)
                    self._owners[id(part)] = param
                    self._group = self._group or group_of(param)
                    if part.numel():
                        params.append((part, number))
            devices = {param.device for param, _ in params}
            if len(devices) != 1:
                names = sorted(map(str, devices))
                raise ConfigError(f"{name} needs all parameters on one device", found=names or "no parameter")
            for param, _ in params:
                if param.dtype not in DTYPES or not param.is_contiguous():
                    raise ConfigError(
                        f"{name} cannot update a parameter",
                        found=f"{param.dtype}, shape {list(param.shape)}, strides {list(param.stride())}",
                        allowed="contiguous tensors of fp32, bf16 or fp16",
                    )
            self._laid_out = self._lay_out(params)
            for index, param in enumerate(self._laid_out.params):
                self.state[self.owner(param)] = self._laid_out.views(index)
        return self._laid_out

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient.

        Raises:
            ConfigError: A gradient is sparse or of another dtype than its parameter.
            TrainingError: At the first step: the host refuses the memory that paged state needs.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        parts = self._flat().params
        grads = [self.owner(part).grad for part in parts]
        self._update(
            [
                None if grad is None else self._dense(local_part(grad), part)
                for grad, part in zip(grads, parts, strict=True)
            ]
        )
        return loss

    def _dense(self, grad: Tensor, param: Tensor) -> Tensor:
        if grad.layout is not torch.strided or grad.dtype is not param.dtype:
            raise ConfigError(
                f"{type(self).__name__} cannot use a gradient",
                found=f"{grad.layout}, {grad.dtype}",
                allowed=f"a dense one of {param.dtype}, as its parameter",
            )
        return grad.contiguous()

    def state_dict(self) -> dict[str, Any]:
        """As torch's. Tensors are views of the state: those of paged moments in the host's memory, up to date now."""
        if self._laid_out is not None:
            self._laid_out.settle()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a `state_dict` into the flat state. Moments keep their dtypes: torch's own would cast them.

        Raises:
            CheckpointError: State of another kind or shape, such as 8-bit state for an optimizer of 32 bits.
        """
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        if self._laid_out is None and not state_dict["state"]:
            return
        flat = self._flat()
        flat.settle()
        for index, part in enumerate(flat.params):
            self.state[self.owner(part)] = flat.views(index)
        numbered = enumerate(param for group in self.param_groups for param in group["params"])
        for number, param in numbered:
            if param not in self.state:  # nothing of it is here
                continue
            saved, views = state_dict["state"].get(number), self.state[param]
            if saved is None:  # never updated
                for view in views.values():
                    view.zero_()
                continue
            found = {name: list(torch.as_tensor(value).shape) for name, value in saved.items()}
            wanted = {name: list(view.shape) for name, view in views.items()}
            if found != wanted:
                raise CheckpointError(
                    f"The optimizer's state of parameter {number} does not fit",
                    found=found,
                    allowed=str(wanted),
                    hint="resume with the optimizer that the run began with",
                )
            for name, view in views.items():
                view.copy_(torch.as_tensor(saved[name]))
