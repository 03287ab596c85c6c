"""AdamW over one flat state, updated for all parameters at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from fourfold.errors import CheckpointError, ConfigError
from fourfold.kernels.adamw import adamw_step
from fourfold.kernels.adamw_state import AdamWState, Hyperparameters, lay_out
from fourfold.optimizers.maps import state_maps

__all__ = ["AdamW"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def _allocate(numel: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Memory of the moments: where state lives is decided here alone."""
    return torch.zeros(numel, dtype=dtype, device=device)


class AdamW(Optimizer):
    """AdamW (https://arxiv.org/abs/1711.05101) with 32-bit or blockwise 8-bit state (https://arxiv.org/abs/2110.02861).

    Its numbers are those of `torch.optim.AdamW` after `clip_grad_norm_`, and those of bitsandbytes' AdamW8bit, with
    three launches a step and no wait for the device. Parameters may be fp32, bf16 or fp16; the arithmetic is fp32.

    A step whose gradients' norm, or `watched_loss`, is not finite changes neither parameters nor state.

    Args:
        params: Parameters or groups of them, all on one device. A group may have its own lr, betas, eps, weight_decay.
        lr: Learning rate; schedulers may change it each step.
        betas: Decay of the two moments.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        state_bits: 32 or 8.
        max_grad_norm: Gradients are clipped to this norm, all together, inside `step`; None or 0: never. `.grad` itself
            is left as it is.
        min_8bit_size: Parameters with fewer elements keep 32-bit state.

    Attributes:
        watched_loss: fp32 scalar on the parameters' device, or None: see above.

    Raises:
        ConfigError: A value out of its range, or parameters that are sparse, of another dtype, not contiguous or on
            several devices.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_bits: int = 32,
        max_grad_norm: float | None = None,
        min_8bit_size: int = 4096,
    ) -> None:
        for key, value, holds, allowed in (
            ("lr", lr, lr >= 0, "0 or more"),
            ("betas", betas, all(0 <= beta < 1 for beta in betas), "0 <= beta < 1"),
            ("eps", eps, eps >= 0, "0 or more"),
            ("weight_decay", weight_decay, weight_decay >= 0, "0 or more"),
            ("state_bits", state_bits, state_bits in (8, 32), "8 or 32"),
            ("max_grad_norm", max_grad_norm, max_grad_norm is None or max_grad_norm >= 0, "0 or more, or None"),
        ):
            if not holds:
                raise ConfigError(f"AdamW: {key} is out of range", found=value, allowed=allowed)
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.state_bits = state_bits
        self.max_grad_norm = max_grad_norm
        self.min_8bit_size = min_8bit_size
        self.watched_loss: Tensor | None = None
        self._laid_out: AdamWState | None = None

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
            raise ConfigError("AdamW takes no new parameters once its state is laid out", hint="make a new one")

    def _flat(self) -> AdamWState:
        # At the first use, not when constructed: until then a model may be moved to another device.
        if self._laid_out is None:
            entries = [
                (param, number, 8 if self.state_bits == 8 and param.numel() >= self.min_8bit_size else 32)
                for number, group in enumerate(self.param_groups)
                for param in group["params"]
                if param.numel()
            ]
            devices = {param.device for param, _, _ in entries}
            if len(devices) != 1:
                names = sorted(map(str, devices))
                raise ConfigError("AdamW needs all parameters on one device", found=names or "no parameter")
            for param, _, _ in entries:
                if param.dtype not in DTYPES or not param.is_contiguous():
                    raise ConfigError(
                        "AdamW cannot update a parameter",
                        found=f"{param.dtype}, shape {list(param.shape)}, strides {list(param.stride())}",
                        allowed="contiguous tensors of fp32, bf16 or fp16",
                    )
            self._laid_out = lay_out(entries, state_maps(next(iter(devices))), _allocate)
            for index, param in enumerate(self._laid_out.params):
                self.state[param] = self._laid_out.views(index)
        return self._laid_out

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient.

        Raises:
            ConfigError: A gradient is sparse or of another dtype than its parameter.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        flat = self._flat()
        grads = [None if param.grad is None else _dense(param.grad, param) for param in flat.params]
        groups = [
            Hyperparameters(group["lr"], group["betas"][0], group["betas"][1], group["eps"], group["weight_decay"])
            for group in self.param_groups
        ]
        adamw_step(flat, grads, groups, self.max_grad_norm, self.watched_loss)
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Copy a `state_dict` into the flat state. Moments keep their dtypes: torch's own would cast them.

        Raises:
            CheckpointError: State of another kind or shape, such as 8-bit state for an optimizer of 32 bits.
        """
        super().load_state_dict({"state": {}, "param_groups": state_dict["param_groups"]})
        if self._laid_out is None and not state_dict["state"]:
            return
        flat = self._flat()
        for index, param in enumerate(flat.params):
            self.state[param] = flat.views(index)
        numbered = enumerate(param for group in self.param_groups for param in group["params"])
        for number, param in numbered:
            if not param.numel():
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


def _dense(grad: Tensor, param: Tensor) -> Tensor:
    if grad.layout is not torch.strided or grad.dtype is not param.dtype:
        raise ConfigError(
            "AdamW cannot use a gradient",
            found=f"{grad.layout}, {grad.dtype}",
            allowed=f"a dense one of {param.dtype}, as its parameter",
        )
    return grad.contiguous()
