"""From a run's configuration to its plan: what fits a GPU and is the fastest of that, and what would help if nothing
does."""

from __future__ import annotations

from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from fourfold.config import RunConfig
from fourfold.config import options as choices
from fourfold.errors import ConfigError, TrainingError
from fourfold.kernels.host_memory import spare_bytes
from fourfold.memory.footprint import GRAPH_LIBRARY_BYTES, LIBRARY_BYTES
from fourfold.memory.gpus import Gpu, gpu_by_name, gpu_present, parse_bytes, split_count
from fourfold.memory.planner import Plan
from fourfold.models.shape_check import shape_differences
from fourfold.remedies import Remedy, Strategy, compare, remedies
from fourfold.run_plan import (
    PLANNED_OPTIMIZERS,
    optimizers_of_the_same_state,
    parallelisms_of,
    run_plan,
    run_shape,
    sequences_of,
    takes_generic_path,
)
from fourfold.training.options import TrainingOptions

__all__ = [
    "PLANNED_OPTIMIZERS",
    "Remedy",
    "Strategy",
    "compare",
    "find_gpus",
    "find_host",
    "kept_to",
    "left_for",
    "plan",
    "plan_for_training",
    "remedies",
    "require_planned_shape",
    "step_down",
]

_WITHOUT_PLAN = "with plan: false, the run starts as it is configured"


def find_gpus(name: str | None, count: int | None = None, limit: int | None = None) -> tuple[Gpu, int]:
    """GPUs of that name or size, or such as the one that is present, and how many.

    Args:
        name: "H200", "24GB", "2xH200"; None: the one that is present.
        count: How many; None: as the name says, or one.
        limit: Bytes that may be taken of the one that is present; None: all.

    Raises:
        ConfigError: An unknown name, two numbers that differ, none at all, no name and no GPU, or a limit that it
            cannot have.
    """
    named, only = (1, None) if name is None else split_count(name)
    number = named if count is None else count
    if number < 1 or (count is not None and named not in (1, count)):
        found = f"{name}, {count} GPUs" if count is not None else name
        raise ConfigError("it is not clear how many GPUs to plan for", found=found, allowed="2xH200, or --gpus 2")
    if only is not None:
        return gpu_by_name(only), number
    present = gpu_present(limit=limit)
    if present is None:
        raise ConfigError("there is no GPU here to plan for", hint="name one: --gpu 24GB, or --gpu H200")
    return present, number


def find_host(amount: str | None, *, is_here: bool) -> int | None:
    """Host memory that a run may use: what is named, or what is free here; None, any, for a GPU that is elsewhere.

    Raises:
        ConfigError: No amount of memory.
    """
    if amount is not None:
        return parse_bytes(amount)
    return spare_bytes() if is_here else None


def plan(
    config: RunConfig, gpu: Gpu | str | None = None, host_bytes: int | None = None, num_gpus: int | None = None
) -> Plan:
    """The plan of a run.

    Args:
        config: The run.
        gpu: Where to: a GPU, its name or its memory, "2xH200"; None: the one that is present, up to `gpu_memory_limit`.
        host_bytes: Host memory that may be used; None: any.
        num_gpus: How many of them; None: as `gpu` says, or one.

    The number of rows of an optimizer step is the configuration's, for all GPUs together; how many of them make a
    microbatch is chosen. So is the optimizer, of `PLANNED_OPTIMIZERS`, where `optim` is null, and how several GPUs
    share the run.

    Raises:
        CheckpointError: There is no such model.
        ConfigError: What cannot be planned: a GGUF file, a checkpoint that is quantized already, layers that do not run
            without data, `recompute` or `packing` where layers take the generic path; or rows that cannot be parted
            among the GPUs.
    """
    card, number = (
        (gpu, num_gpus or 1) if isinstance(gpu, Gpu) else find_gpus(gpu, num_gpus, choices.memory_limit(config))
    )
    return run_plan(config, card, host_bytes, parallelisms=parallelisms_of(number))


def plan_for_training(config: RunConfig, gpu: Gpu | None, host_bytes: int | None = None) -> Plan | None:
    """The plan that a run keeps to: microbatches of at most the configuration's rows, as fast as what fits.

    Args:
        config: The run.
        gpu: Where it trains; None: not on a GPU.
        host_bytes: Host memory that may be used; None: any.

    Returns:
        None where nothing is planned: off GPUs, with `plan: false`, where `recompute` is given, for models that give
        scores, and for what cannot be planned.

    Raises:
        TrainingError: Nothing fits.
    """
    if gpu is None or not config.plan or config.recompute is not None or config.method == "reward":
        return None
    try:
        made = run_plan(config, gpu, host_bytes, most=config.per_device_train_batch_size)
    except ConfigError:
        return None
    if made.chosen is not None:
        return made
    helps = [str(remedy) for remedy in remedies(config, gpu, host_bytes)]
    raise TrainingError(
        made.lines()[-1],
        found=f"{gpu.usable_bytes / 2**30:.2f} GiB usable on {gpu.name}"
        + ("" if host_bytes is None else f", {host_bytes / 2**30:.1f} GiB of host memory"),
        allowed=f"what would fit: {'; '.join(helps) or 'nothing known here'}",
        hint=f"see `fourfold plan`; {_WITHOUT_PLAN}",
    )


def step_down(config: RunConfig, failed: Plan, now: Gpu | None = None) -> Plan | None:
    """The next plan that takes at least a tenth less, and fits what is left; None where there is none.

    Args:
        config: The run, as it was asked for.
        failed: What did not fit. Where its optimizer was planned, the next one keeps state of the same bits, which goes
            on from a checkpoint, on the GPU or paged.
        now: What others leave of the GPU now; None: not looked at.
    """
    assert failed.chosen is not None
    usable = failed.chosen.footprint.peak_bytes * 9 // 10
    if now is not None:
        usable = min(usable, now.usable_bytes)
    optimizers = optimizers_of_the_same_state(failed.chosen.optimizer) if config.optim is None else None
    most = config.per_device_train_batch_size
    made = run_plan(config, failed.gpu.with_usable(usable), failed.host_bytes, most=most, optimizers=optimizers)
    return made if made.chosen is not None else None


def require_planned_shape(config: RunConfig, model: PreTrainedModel | PeftModel) -> None:
    """Raises TrainingError, naming what differs, for a model that is not the one that was planned for.

    Args:
        config: The run that was planned.
        model: What was loaded for it, with its adapter if it has one.
    """
    differences = [str(one) for one in shape_differences(run_shape(config), model)]
    if differences:
        raise TrainingError(
            "the plan does not describe the model that was loaded",
            found="; ".join(differences),
            allowed=f"what {config.model_name_or_path} says in its config.json",
            hint=_WITHOUT_PLAN,
        )


def left_for(config: RunConfig, device: torch.device, standing_bytes: int) -> Gpu | None:
    """The GPU as others leave it to a run that is under way; None off GPUs.

    Args:
        config: The run.
        device: Where it is.
        standing_bytes: What it holds between its steps: weights, adapters, optimizer state.
    """
    if device.type != "cuda":
        return None
    # What the libraries work in is never given back, and part of each plan.
    own = standing_bytes + LIBRARY_BYTES + GRAPH_LIBRARY_BYTES
    return gpu_present(device, choices.memory_limit(config), held_bytes=own)


def kept_to(config: RunConfig, plan: Plan | None) -> RunConfig:
    """The configuration with what was planned; without a plan, with the default optimizer where none is given."""
    if plan is None:
        return config.model_copy(update={"optim": config.optim or TrainingOptions.optim})
    assert plan.chosen is not None
    update: dict[str, Any] = {
        "per_device_train_batch_size": plan.chosen.batch // sequences_of(config),
        "gradient_accumulation_steps": plan.chosen.accumulation,
        "optim": plan.chosen.optimizer,
    }
    if takes_generic_path(config):
        # What such layers compute again is Transformers' to say.
        update["gradient_checkpointing"] = plan.chosen.recompute == "full"
    else:
        update["recompute"] = plan.chosen.recompute
    return config.model_copy(update=update)
