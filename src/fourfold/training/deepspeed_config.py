"""DeepSpeed's configuration: made from the run's, or a file of the user's, as far as both say the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fourfold.errors import ConfigError

__all__ = ["OFFLOADS", "ZERO_OPTIMIZERS", "ZeroOptions", "deepspeed_config", "read_deepspeed_file", "stage_of_file"]

# `distributed_offload` -> the parts of ZeRO's configuration that wait in host memory
OFFLOADS: dict[str, tuple[str, ...]] = {
    "none": (),
    "optimizer": ("offload_optimizer",),
    "all": ("offload_optimizer", "offload_param"),
}

# `optim` -> what the Trainer makes of it. DeepSpeed gives an optimizer one flat fp32 tensor, a share of all parameters:
# AdamW's state of it can be told by parameter again, factors and blocks of 8 bits cannot.
ZERO_OPTIMIZERS: dict[str, str] = {
    "adamw": "adamw_torch_fused",
    "adamw_torch": "adamw_torch",
    "adamw_torch_fused": "adamw_torch_fused",
}

# Of a user's file: what would say again, or otherwise, what the run's own keys say.
_ELSEWHERE = {
    "optimizer": "optim, learning_rate and weight_decay say it",
    "scheduler": "lr_scheduler_type and warmup_ratio say it",
    "amp": "bnb_4bit_compute_dtype says it",
    "torch_autocast": "bnb_4bit_compute_dtype says it",
    "elasticity": "batch sizes are the run's own",
    "tensor_parallel": "ZeRO alone is used",
    "pipeline": "ZeRO alone is used",
    "autotuning": "ZeRO alone is used",
}
_QUANTIZES_AGAIN = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")


@dataclass(frozen=True)
class ZeroOptions:
    """What of a run DeepSpeed is told.

    Attributes:
        stage: 1, 2 or 3.
        offload: A key of `OFFLOADS`.
        num_processes: How many share the run.
        computes_in_bf16: Whether the model computes in bfloat16.
        on_gpu: Whether host memory is worth pinning.
    """

    stage: int
    offload: str
    num_processes: int
    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    max_grad_norm: float
    computes_in_bf16: bool
    on_gpu: bool

    def batch_sizes(self) -> dict[str, int]:
        """By DeepSpeed's names."""
        micro, steps = self.per_device_train_batch_size, self.gradient_accumulation_steps
        return {
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": steps,
            "train_batch_size": micro * steps * self.num_processes,
        }


def deepspeed_config(options: ZeroOptions) -> dict[str, Any]:
    """The configuration of a run without a file of its own.

    Neither bf16 nor fp16 is switched on: DeepSpeed would cast the adapters, which are fp32, to it. The base is in the
    dtype that it computes in already, and quantized codes have none.

    Raises:
        ConfigError: DeepSpeed is not installed.
    """
    require_deepspeed()
    # DeepSpeed's own bucket is 2 GB of the GPU's memory, and adapters' gradients are few.
    zero: dict[str, Any] = {"stage": options.stage, "reduce_bucket_size": "auto"}
    for part in OFFLOADS[options.offload]:
        zero[part] = {"device": "cpu", "pin_memory": options.on_gpu}
    if options.stage == 3:
        # In numbers of the model's width, by the Trainer: what is small, such as norms, stays whole.
        zero["stage3_param_persistence_threshold"] = "auto"
    return _completed({"zero_optimization": zero}, options)


def _completed(config: dict[str, Any], options: ZeroOptions) -> dict[str, Any]:
    return config | {
        **options.batch_sizes(),
        "gradient_clipping": options.max_grad_norm,
        "bf16": {"enabled": False},
        "fp16": {"enabled": False},
        "zero_allow_untested_optimizer": True,
        # PyTorch's AdamW also on the host: DeepSpeed's would be compiled when the run begins.
        "zero_force_ds_cpu_optimizer": False,
    }


def require_deepspeed() -> None:
    """Raises ConfigError where DeepSpeed is not installed; does not import it."""
    if find_spec("deepspeed") is None:
        raise ConfigError(
            "distributed: zero1, zero2 and zero3 take DeepSpeed, which is not installed",
            allowed=["ddp", "fsdp2"],
            hint="pip install 'fourfold[deepspeed]'",
        )


def stage_of_file(path: Path) -> int:
    """The stage of ZeRO in a user's file.

    Raises:
        ConfigError: The file cannot be read, or has no stage from 1 to 3.
    """
    return _stage(_read(path), path)


def read_deepspeed_file(path: Path, options: ZeroOptions) -> dict[str, Any]:
    """The configuration in a user's file, "auto" filled in from the run.

    Args:
        options: The run's; its stage is the file's, its offload "none": the file says it.

    Raises:
        ConfigError: DeepSpeed is not installed, the file cannot be read, or it and the run do not say the same; all
            that differs is named.
    """
    require_deepspeed()
    config = _read(path)
    _stage(config, path)
    faults = list(_faults(config, options))
    if faults:
        raise ConfigError(
            f"{path} does not fit this run",
            found="; ".join(faults),
            hint='what the run says too may be left out of the file, or be "auto" there',
        )
    return _completed(config, options)


def _read(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"deepspeed: {path} cannot be read", found=error.strerror) from error
    except ValueError as error:
        raise ConfigError(f"deepspeed: {path} is no JSON", found=error) from error
    if not isinstance(config, dict):
        raise ConfigError(f"deepspeed: {path} holds no configuration", found=type(config).__name__, allowed="an object")
    return config


def _stage(config: dict[str, Any], path: Path) -> int:
    zero = config.get("zero_optimization")
    stage = zero.get("stage") if isinstance(zero, dict) else None
    if type(stage) is not int or stage not in (1, 2, 3):
        raise ConfigError(
            f"deepspeed: {path} names no stage of ZeRO",
            found=f"zero_optimization.stage: {stage}",
            allowed=[1, 2, 3],
            hint="without ZeRO, leave deepspeed out: distributed: ddp",
        )
    return stage


def _faults(config: dict[str, Any], options: ZeroOptions) -> Iterator[str]:
    said = options.batch_sizes() | {"gradient_clipping": options.max_grad_norm}
    for key, value in said.items():
        found = config.get(key, "auto")
        if found not in ("auto", value):
            yield f"{key} is {found}, the run's is {value}"
    for key, why in _ELSEWHERE.items():
        if config.get(key):
            yield f"{key} is not for the file: {why}"
    if _is_on(config, "fp16"):
        yield "fp16 is enabled, and ZeRO trains fp32 adapters on a base of bfloat16 or float32 here"
    if _is_on(config, "bf16") and not options.computes_in_bf16:
        yield "bf16 is enabled, and the run computes in float32 (bnb_4bit_compute_dtype)"
    zero = config["zero_optimization"]
    for part in ("offload_optimizer", "offload_param"):
        device = (zero.get(part) or {}).get("device", "none")
        if device not in ("none", "cpu"):
            yield f"{part}.device is {device}; none and cpu are known"
    for key in _QUANTIZES_AGAIN:
        if zero.get(key):
            yield f"{key} would quantize the base once more"


def _is_on(config: dict[str, Any], precision: str) -> bool:
    section = config.get(precision)
    return isinstance(section, dict) and section.get("enabled") is True
