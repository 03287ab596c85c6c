"""DeepSpeed's ZeRO: what it must know of our layers, and its partitioned state as a checkpoint holds it.

Stages 1 and 2 leave the parameters whole on each process; stage 3 partitions each of them, the bytes of a quantized
weight too, its codes and scales, and gathers them layer by layer.
"""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fourfold.adapters.weighing import weighed_parameters
from fourfold.errors import CheckpointError, ConfigError
from fourfold.models.block import keep_order
from fourfold.models.hooks import HOOKS
from fourfold.models.underlying import decoder_layers, underlying
from fourfold.quantization.linear import QuantizedWeight
from fourfold.training.processes import follow_main
from fourfold.training.whole_state import WholeState

__all__ = ["ZeroState", "prepare_for_zero", "prepare_for_zero3", "whole_head"]

# What a group of the optimizer has beside its parameters and its implementation.
_SCHEDULED = ("lr", "initial_lr", "betas", "eps", "weight_decay")
_MOMENTS = ("exp_avg", "exp_avg_sq")


def prepare_for_zero(model: nn.Module) -> None:
    """Make sure that DeepSpeed can train what is trained of `model`.

    DeepSpeed sums gradients over the processes in the order in which they arrive. In another order on one of them it
    would add those of different parameters, so fused blocks keep to one.

    Raises:
        ConfigError: A trained parameter is not fp32: DeepSpeed joins all of them to one tensor.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            raise ConfigError(
                "ZeRO trains fp32 parameters here, as adapters are",
                found=f"{name}: {parameter.dtype}",
                hint="leave modules_to_save out, or give distributed: ddp",
            )
    keep_order(model)
    # DeepSpeed brings parameters along, codes among them, but not their scales.
    follow_main(model, with_codes=False)


def prepare_for_zero3(model: nn.Module, device: torch.device) -> None:
    """`prepare_for_zero`, and each decoder layer as one module whose parameters are gathered together.

    A fused block, and an adapter over a quantized layer, read parameters of modules that they do not call, so hooks on
    those would never run. DeepSpeed reduces the gradients of such a module when that of its input arrives, so the first
    layer's input must have one.

    Raises:
        ConfigError: A trained parameter is not fp32, or is the output layer's; or there are no decoder layers.
    """
    from deepspeed.utils import set_z3_leaf_module

    prepare_for_zero(model)
    base = underlying(model)
    head = base.get_output_embeddings()
    if head is not None and any(parameter.requires_grad for parameter in head.parameters()):
        raise ConfigError(
            "ZeRO-3 does not train the output layer, which the loss multiplies with in pieces",
            hint="leave it out of target_modules and modules_to_save, or give distributed: zero2",
        )
    for module in model.modules():
        if isinstance(module, QuantizedWeight):
            module.join_scales(device)
    layers = decoder_layers(base)
    if layers is None:
        raise ConfigError("no decoder layers to gather were found", found=type(base).__name__)
    for layer in layers:
        set_z3_leaf_module(layer, True)
    base.enable_input_require_grads()


@contextmanager
def whole_head(lm_head: nn.Module) -> Iterator[nn.Module]:
    """The output layer with its weight gathered, and without the hooks that would gather it at each call."""
    partitioned = [parameter for parameter in lm_head.parameters() if hasattr(parameter, "ds_id")]
    if not partitioned:
        yield lm_head
        return
    import deepspeed

    plain = copy.copy(lm_head)
    plain.__dict__.update({name: OrderedDict() for name in HOOKS})
    with deepspeed.zero.GatheredParameters(partitioned):
        yield plain


class ZeroState(WholeState):
    """Weights and optimizer state that DeepSpeed has partitioned, made whole by its public functions."""

    def weights(self, model: nn.Module) -> dict[str, Tensor] | None:
        trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
        if not any(hasattr(value, "ds_id") for value in trained.values()):
            return None
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(trained.values())):
            return {name: value.detach().cpu().clone() for name, value in trained.items()}

    def weigh(self, model: nn.Module, weight: float) -> None:
        weighed = weighed_parameters(model)
        if not any(hasattr(value, "ds_id") for value in weighed):
            super().weigh(model, weight)
            return
        import deepspeed

        # What the main process leaves in them, whole as they are within, becomes everyone's part.
        with torch.no_grad(), deepspeed.zero.GatheredParameters(weighed, modifier_rank=0):
            if deepspeed.comm.get_rank() == 0:
                for parameter in weighed:
                    parameter.mul_(weight)

    def shapes(self, model: nn.Module) -> dict[str, torch.Size]:
        return {
            name: getattr(value, "ds_shape", value.shape)
            for name, value in model.named_parameters()
            if value.requires_grad
        }

    def groups(self, optimizer: Any, model: nn.Module) -> list[list[str]] | None:
        return None

    def head(self, base: PreTrainedModel) -> AbstractContextManager[nn.Module]:
        return whole_head(base.get_output_embeddings())

    def optimizer(self, optimizer: Any, model: nn.Module) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        zero = optimizer.optimizer
        client = zero.optimizer
        kept = client.state[_partitions(zero)[0]]
        moments = [name for name, value in kept.items() if value.dim()]
        groups = _groups(zero)
        state = {
            index: {"step": kept["step"].detach().cpu().clone()}
            | {name: safe_get_full_optimizer_state(param, name).cpu().contiguous() for name in moments}
            for index, param in enumerate(itertools.chain.from_iterable(groups))
        }
        numbers = itertools.count()
        param_groups = [
            {key: value for key, value in group.items() if key != "params"}
            | {"params": [next(numbers) for _ in params]}
            for group, params in zip(client.param_groups, groups, strict=True)
        ]
        return {"state": state, "param_groups": param_groups}

    def load_optimizer(self, optimizer: Any, model: nn.Module, state: dict[str, Any]) -> None:
        from deepspeed.utils import lazy_init_hp_params_optimizer_state

        zero = optimizer.optimizer
        client = zero.optimizer
        groups = _groups(zero)
        saved_groups = state["param_groups"]
        found, wanted = [len(group["params"]) for group in saved_groups], [len(params) for params in groups]
        if found != wanted:
            raise CheckpointError(
                "The optimizer's groups of parameters do not fit",
                found=found,
                allowed=str(wanted),
                hint="resume with the optimizer and adapters that the run began with",
            )
        for group, saved in zip(client.param_groups, saved_groups, strict=True):
            group.update({key: value for key, value in saved.items() if key in group and key in _SCHEDULED})
        params = list(itertools.chain.from_iterable(groups))
        saved_state = {index: _fitting(index, params[index], state["state"].get(index)) for index in range(len(params))}
        step = max((float(torch.as_tensor(values["step"])) for values in saved_state.values() if values), default=0.0)
        for flat in _partitions(zero):
            client.state[flat] = {
                "step": torch.tensor(step, dtype=torch.float32, device=flat.device if _is_fused(client) else "cpu"),
                "exp_avg": torch.zeros_like(flat),
                "exp_avg_sq": torch.zeros_like(flat),
            }
        if hasattr(zero, "bit16_groups"):
            for group, flat in zip(zero.bit16_groups, _partitions(zero), strict=True):
                lazy_init_hp_params_optimizer_state(group, flat, client.state)
        for param, values in zip(params, saved_state.values(), strict=True):
            for name in _MOMENTS if values else ():
                _set_moment(param, values[name], name)


def _fitting(number: int, param: nn.Parameter, saved: Mapping[str, Any] | None) -> Mapping[str, Any]:
    """The saved state of a parameter; empty where it was never updated."""
    if saved is None:
        return {}
    shape = list(getattr(param, "ds_shape", param.shape))
    found = {name: list(torch.as_tensor(value).shape) for name, value in saved.items()}
    wanted = {"step": []} | dict.fromkeys(_MOMENTS, shape)
    if found != wanted:
        raise CheckpointError(
            f"The optimizer's state of parameter {number} does not fit",
            found=found,
            allowed=str(wanted),
            hint="ZeRO goes on with AdamW's 32-bit state; resume with the optimizer that the run began with",
        )
    return saved


def _set_moment(param: Any, value: Tensor, name: str) -> None:
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if not hasattr(param, "ds_id"):
        safe_set_full_optimizer_state(param, value.to(param.device), name)
        return
    # The last partition is filled up, and `safe_set_full_optimizer_state` does not see to it.
    size, rank = param.ds_tensor.ds_numel, param.ds_zero_partition_rank
    parts = torch.zeros(param.ds_zero_partition_world_size * size, dtype=value.dtype)
    parts[: value.numel()] = value.flatten()
    safe_set_local_optimizer_state(param, parts[rank * size : (rank + 1) * size], name)


def _groups(zero: Any) -> list[list[nn.Parameter]]:
    """The parameters of each group of the optimizer, in their order."""
    if hasattr(zero, "bit16_groups"):  # stages 1 and 2
        return [list(group) for group in zero.bit16_groups]
    groups: list[list[nn.Parameter]] = [[] for _ in zero.optimizer.param_groups]
    for number, params in enumerate(zero.fp16_groups):
        groups[zero.sub_group_to_group_id[number]].extend(params)
    return groups


def _partitions(zero: Any) -> list[Tensor]:
    """The flat fp32 tensors that this process updates."""
    if hasattr(zero, "bit16_groups"):
        return list(zero.single_partition_of_fp32_groups)
    return list(zero.fp32_partitioned_groups_flat)


def _is_fused(client: torch.optim.Optimizer) -> bool:
    return bool(client.param_groups[0].get("fused"))
