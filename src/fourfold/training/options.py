"""The options of a training run, under the names that Hugging Face gave them."""

from __future__ import annotations

import dataclasses
from collections.abc import Container
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer
from transformers import Trainer
from trl import SFTConfig

from fourfold.errors import ConfigError
from fourfold.optimizers import Adafactor, AdamW, Lion
from fourfold.optimizers.base import OwnOptimizer
from fourfold.optimizers.moments import MomentOptimizer
from fourfold.training.best import BestOptions
from fourfold.training.deepspeed_config import (
    OFFLOADS,
    ZERO_OPTIMIZERS,
    ZeroOptions,
    deepspeed_config,
    read_deepspeed_file,
)
from fourfold.training.distributed import DistributedRow, distributed_row, processes
from fourfold.training.parameter_groups import GroupOptions, parameter_groups

__all__ = [
    "COMPUTE_DTYPES",
    "LR_SCHEDULERS",
    "OPTIMIZERS",
    "STRATEGIES",
    "OptimizerRow",
    "TrainingOptions",
    "keep_in_fp32",
    "optimizer_arguments",
    "to_sft_config",
]


class OptimizerRow(NamedTuple):
    """An optimizer of ours: its class, and how its state is kept, for which see `fourfold.optimizers.moments`.

    Attributes:
        rule: The update rule's name, as `fourfold.optimizers.footprint` knows it.
        state_bits: 32 or 8; Adafactor knows no 8.
        placement: "resident" or "paged".
    """

    optimizer: type[OwnOptimizer]
    rule: str
    state_bits: int = 32
    placement: str = "resident"

    def arguments(self) -> dict[str, Any]:
        """What its class is made with, of these."""
        if not issubclass(self.optimizer, MomentOptimizer):
            return {}
        return {"state_bits": self.state_bits, "placement": self.placement}


# name -> our optimizer; None: the Trainer makes it, by this name. All keep their state in plain tensors, as the
# checkpoint needs.
OPTIMIZERS: dict[str, OptimizerRow | None] = {
    "adamw": OptimizerRow(AdamW, "adamw"),
    "adamw_8bit": OptimizerRow(AdamW, "adamw", 8),
    "paged_adamw_32bit": OptimizerRow(AdamW, "adamw", 32, "paged"),
    "paged_adamw_8bit": OptimizerRow(AdamW, "adamw", 8, "paged"),
    "lion": OptimizerRow(Lion, "lion"),
    "lion_8bit": OptimizerRow(Lion, "lion", 8),
    "paged_lion_32bit": OptimizerRow(Lion, "lion", 32, "paged"),
    "paged_lion_8bit": OptimizerRow(Lion, "lion", 8, "paged"),
    "adafactor": OptimizerRow(Adafactor, "adafactor"),
    "adamw_torch": None,
    "adamw_torch_fused": None,
}

# name -> whether it knows a warm-up
LR_SCHEDULERS: dict[str, bool] = {
    "linear": True,
    "cosine": True,
    "constant": False,
    "constant_with_warmup": True,
}

# name -> the Trainer's mixed-precision switches
COMPUTE_DTYPES: dict[str, dict[str, bool]] = {
    "bfloat16": {"bf16": True, "fp16": False},
    "float16": {"bf16": False, "fp16": True},
    "float32": {"bf16": False, "fp16": False},
}

# when to evaluate and when to save
STRATEGIES = ("no", "steps", "epoch")


@dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """How a model is trained.

    Attributes:
        output_dir: The run folder; checkpoints are written into it.
        max_steps: Optimizer steps; above 0 it overrides `num_train_epochs`.
        warmup_ratio: Share of all steps, 0 <= ratio < 1. At most one of this and `warmup_steps` may be set.
        eval_steps, save_steps: Optimizer steps between two evaluations and two checkpoints; they count
            where the strategy is "steps".
        save_total_limit: How many checkpoints are kept, the newest; None keeps all.
        compute_dtype: "bfloat16" and "float16" run matrix products under autocast; parameters keep their own dtype.
            "float16" also scales the loss, so that small gradients do not vanish, and takes a GPU.
        group_by_length: Batches hold rows of like length; less padding, less randomness.
        report_to: Trackers by the Trainer's names, such as "tensorboard"; none by default.
        run_name: The run's name there; None: the tracker's own choice.
        project: Its project in trackio; for W&B and MLflow see `fourfold.training.trackers.tracking`.
        use_cpu: None takes an accelerator where there is one.
        neftune_noise_alpha: Strength of noise on embeddings, NEFTune (https://arxiv.org/abs/2310.05914); None: none.
        groups: Parameters with a learning rate of their own.
        best: Which evaluation is the best, and whether training stops early.
        distributed: "auto" or a key of `fourfold.training.distributed.DISTRIBUTED`.
        ddp_timeout: Seconds that a process waits for the others.
        distributed_offload: A key of `OFFLOADS`: what of ZeRO waits in host memory.
        deepspeed: The user's own configuration of DeepSpeed, JSON; None: it is made from these options.
        model_dtype: What the model computes in; DeepSpeed's file must not say otherwise.

    Raises:
        ConfigError: A value is out of its range or not in its table.
    """

    output_dir: Path
    num_train_epochs: float = 1.0
    max_steps: int = -1
    per_device_train_batch_size: int = 8
    per_device_eval_batch_size: int = 8
    gradient_accumulation_steps: int = 1
    learning_rate: float = 2e-4
    lr_scheduler_type: str = "cosine"
    warmup_ratio: float = 0.0
    warmup_steps: int = 0
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    optim: str = "adamw"
    logging_steps: int = 10
    eval_strategy: str = "no"
    eval_steps: int = 100
    save_strategy: str = "steps"
    save_steps: int = 100
    save_total_limit: int | None = 2
    gradient_checkpointing: bool = False
    compute_dtype: str = "bfloat16"
    seed: int = 42
    report_to: tuple[str, ...] = ()
    run_name: str | None = None
    project: str | None = None
    dataloader_num_workers: int = 0
    group_by_length: bool = False
    use_cpu: bool | None = None
    neftune_noise_alpha: float | None = None
    groups: GroupOptions = field(default_factory=GroupOptions)
    best: BestOptions = field(default_factory=BestOptions)
    distributed: str = "auto"
    ddp_timeout: int = 600
    distributed_offload: str = "none"
    deepspeed: Path | None = None
    model_dtype: str = "bfloat16"

    @property
    def row(self) -> DistributedRow:
        """How this run's processes share it."""
        return distributed_row(self.distributed, processes().count)

    def __post_init__(self) -> None:
        _require_known("optim", self.optim, OPTIMIZERS)
        _require_known("lr_scheduler_type", self.lr_scheduler_type, LR_SCHEDULERS)
        _require_known("compute_dtype", self.compute_dtype, COMPUTE_DTYPES)
        _require_known("eval_strategy", self.eval_strategy, STRATEGIES)
        _require_known("save_strategy", self.save_strategy, STRATEGIES)
        _require_known("distributed_offload", self.distributed_offload, OFFLOADS)
        for key in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "gradient_accumulation_steps",
            "logging_steps",
            "eval_steps",
            "save_steps",
        ):
            _require(key, getattr(self, key), getattr(self, key) >= 1, "a whole number, 1 or more")
        limit = self.save_total_limit
        _require("save_total_limit", limit, limit is None or limit >= 1, "1 or more, or null to keep all")
        _require("learning_rate", self.learning_rate, self.learning_rate > 0, "a number above 0")
        _require("warmup_ratio", self.warmup_ratio, 0 <= self.warmup_ratio < 1, "0 <= warmup_ratio < 1")
        alpha = self.neftune_noise_alpha
        _require("neftune_noise_alpha", alpha, alpha is None or alpha > 0, "above 0, or null")
        for key in ("warmup_steps", "weight_decay", "max_grad_norm", "dataloader_num_workers"):
            _require(key, getattr(self, key), getattr(self, key) >= 0, "0 or more")
        epochs, steps = self.num_train_epochs, self.max_steps
        _require("num_train_epochs", epochs, epochs > 0 or steps > 0, "above 0, or max_steps above 0")
        if self.best.is_asked_for and self.eval_strategy == "no":
            raise ConfigError("nothing tells the best of no evaluations", found="eval_strategy: no")
        if self.best.load_at_end and self.save_strategy == "no":
            raise ConfigError("load_best_model_at_end takes checkpoints", found="save_strategy: no")
        if self.warmup_ratio and self.warmup_steps:
            raise ConfigError(
                "warmup_ratio and warmup_steps are both set",
                found=f"warmup_ratio {self.warmup_ratio}, warmup_steps {self.warmup_steps}",
                hint="keep one of them",
            )
        if (self.warmup_ratio or self.warmup_steps) and not LR_SCHEDULERS[self.lr_scheduler_type]:
            raise ConfigError(
                f"lr_scheduler_type {self.lr_scheduler_type!r} has no warm-up",
                hint=f"use '{self.lr_scheduler_type}_with_warmup', or set the warm-up to 0",
            )


def _require_known(key: str, value: str, table: Container[str]) -> None:
    if value not in table:
        raise ConfigError(f"{key} is not known", found=repr(value), allowed=table)  # type: ignore[arg-type]


def _require(key: str, value: object, holds: bool, allowed: str) -> None:
    if not holds:
        raise ConfigError(f"{key} is out of range", found=value, allowed=allowed)


def to_sft_config(options: TrainingOptions) -> SFTConfig:
    """TRL's configuration for `options`.

    The rows come tokenized and masked, so TRL's own preparation, truncation and packing are off.
    """
    use_cpu = not torch.accelerator.is_available() if options.use_cpu is None else options.use_cpu
    config = SFTConfig(
        output_dir=str(options.output_dir),
        num_train_epochs=options.num_train_epochs,
        max_steps=options.max_steps,
        per_device_train_batch_size=options.per_device_train_batch_size,
        per_device_eval_batch_size=options.per_device_eval_batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        learning_rate=options.learning_rate,
        lr_scheduler_type=options.lr_scheduler_type,
        # Transformers 5 reads a number below 1 as a share of all steps.
        warmup_steps=options.warmup_ratio or options.warmup_steps,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        # The Trainer knows no name for ours, which `optimizer_arguments` hands it as a class.
        optim=_trainer_optimizer(options),
        logging_strategy="steps",
        logging_steps=options.logging_steps,
        logging_first_step=True,
        # A loss that is not finite must be seen, not averaged away.
        logging_nan_inf_filter=False,
        eval_strategy=options.eval_strategy,
        eval_steps=options.eval_steps,
        prediction_loss_only=True,
        save_strategy=options.save_strategy,
        save_steps=options.save_steps,
        save_total_limit=options.save_total_limit,
        neftune_noise_alpha=options.neftune_noise_alpha,
        **options.best.trainer_arguments(),
        **_recomputation(options.gradient_checkpointing),
        **COMPUTE_DTYPES[options.compute_dtype],
        seed=options.seed,
        data_seed=options.seed,
        report_to=list(options.report_to) or "none",
        run_name=options.run_name,
        **({} if options.project is None else {"project": options.project}),
        dataloader_num_workers=options.dataloader_num_workers,
        dataloader_pin_memory=not use_cpu,
        train_sampling_strategy="group_by_length" if options.group_by_length else "random",
        use_cpu=use_cpu,
        average_tokens_across_devices=True,
        ddp_timeout=options.ddp_timeout,
        **options.row.arguments,
        **_deepspeed(options, on_gpu=not use_cpu),
        disable_tqdm=True,
        remove_unused_columns=False,
        packing=False,
        padding_free=False,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    # Given as an argument, it has to fit save_steps; here the best step is saved whatever they are.
    config.load_best_model_at_end = options.best.load_at_end
    if options.best.load_at_end and options.save_total_limit == 1:
        # The newest, from which an interrupted run goes on, and the best.
        config.save_total_limit = 2
    return config


def keep_in_fp32(model: nn.Module, switches: dict[str, bool]) -> None:
    """Master copies: what is trained in fp16 is held in fp32, where a small update is not lost.

    Args:
        model: Its trained parameters are cast in place.
        switches: A row of `COMPUTE_DTYPES`.

    Raises:
        ConfigError: Nothing in the model can be trained.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError("The model has no parameter to train", hint="add adapters, or load them as trainable")
    if switches["fp16"]:
        for parameter in trained:
            parameter.data = parameter.data.float()


def optimizer_arguments(
    options: TrainingOptions, model: nn.Module, config: SFTConfig
) -> tuple[type[Optimizer], dict[str, Any]] | None:
    """The Trainer's `optimizer_cls_and_kwargs`; None where the Trainer makes all of it.

    Args:
        options: The optimizer, and which parameters have a learning rate of their own.
        model: Whose parameters are trained.
        config: `to_sft_config(options)`.

    Raises:
        ConfigError: As `parameter_groups`.
    """
    row = OPTIMIZERS[options.optim]
    if options.row.zero_stage is not None:
        if options.groups.is_asked_for:
            raise ConfigError(
                "DeepSpeed's ZeRO knows one learning rate for all that is trained",
                found="loraplus_lr_ratio or lr_groups",
                allowed="distributed: ddp or fsdp2",
            )
        return None
    chosen: type[Optimizer]
    if row is not None:
        chosen, arguments = row.optimizer, {"max_grad_norm": options.max_grad_norm, **row.arguments()}
    elif options.groups.is_asked_for:
        chosen, arguments = Trainer.get_optimizer_cls_and_kwargs(config)
    else:
        return None
    if options.groups.is_asked_for:
        # The Trainer takes them in place of its own two.
        arguments["params"] = parameter_groups(model, options.groups, options.learning_rate, options.weight_decay)
    return chosen, arguments | {"lr": options.learning_rate}


def _trainer_optimizer(options: TrainingOptions) -> str:
    """The Trainer's name of the optimizer; of ours, one that is not asked for.

    Raises:
        ConfigError: DeepSpeed's ZeRO cannot step it.
    """
    if options.row.zero_stage is None:
        return "adamw_torch" if OPTIMIZERS[options.optim] else options.optim
    if options.optim not in ZERO_OPTIMIZERS:
        raise ConfigError(
            "this optimizer's state cannot be partitioned by ZeRO",
            found=f"optim: {options.optim}, distributed: {options.distributed}",
            allowed=ZERO_OPTIMIZERS,
            hint="its state is divided over the GPUs as it is; distributed_offload: optimizer moves it to host memory",
        )
    return ZERO_OPTIMIZERS[options.optim]


def _deepspeed(options: TrainingOptions, *, on_gpu: bool) -> dict[str, Any]:
    """The Trainer's `deepspeed`, where DeepSpeed prepares the model."""
    stage = options.row.zero_stage
    if stage is None:
        return {}
    zero = ZeroOptions(
        stage=stage,
        offload=options.distributed_offload,
        num_processes=processes().count,
        per_device_train_batch_size=options.per_device_train_batch_size,
        gradient_accumulation_steps=options.gradient_accumulation_steps,
        max_grad_norm=options.max_grad_norm,
        computes_in_bf16=options.model_dtype == "bfloat16",
        on_gpu=on_gpu,
    )
    path = options.deepspeed
    return {"deepspeed": deepspeed_config(zero) if path is None else read_deepspeed_file(path, zero)}


def _recomputation(on: bool) -> dict[str, Any]:
    """The switches of activation checkpointing, by the name this version of Transformers gives them.

    TRL reads and defaults the older name, so both are given where both exist. Non-reentrant
    checkpointing is the one that works where only the adapters need gradients.
    """
    known = {field.name for field in dataclasses.fields(SFTConfig)}
    switches: dict[str, Any] = {}
    for prefix in ("gradient", "activation"):
        if f"{prefix}_checkpointing" in known:
            switches[f"{prefix}_checkpointing"] = on
            switches[f"{prefix}_checkpointing_kwargs"] = {"use_reentrant": False} if on else None
    return switches
