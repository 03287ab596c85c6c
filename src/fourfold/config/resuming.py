"""A run that goes on with another configuration: what may change, what that changes, and what cannot.

A checkpoint holds weights, an optimizer's state with its rates, a place in the order of rows, and random numbers. What
these belong to cannot change. Of all other keys those in `_OF_NO_ACCOUNT` change nothing that is computed; the rest may
change, and is told, since the run is another one from there on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fourfold.config.run import RunConfig
from fourfold.errors import ConfigError

__all__ = ["Change", "Resumption", "changes"]

# What of a checkpoint belongs to keys that cannot change.
_BELONGS: dict[str, tuple[str, ...]] = {
    "its adapter belongs to that base": (
        *("method", "model_name_or_path", "model_revision", "load_in_8bit", "llm_int8_threshold", "load_in_4bit"),
        *("bnb_4bit_quant_type", "bnb_4bit_use_double_quant", "bnb_4bit_blocksize", "calibration", "quantize_lm_head"),
        *("quantize_embeddings", "modules_to_not_convert", "requantize_every"),
    ),
    "it holds that adapter": (
        *("adapter", "lora_r", "lora_alpha", "use_rslora", "use_dora", "init_lora_weights", "loftq_iterations"),
        *("target_modules", "modules_to_save"),
    ),
    "it is at a place in those rows": (
        *("train_dataset", "stopping_strategy", "eval_split_fraction", "row_format", "columns", "max_length"),
        *("packing", "train_on_prompt", "overlong", "chat_template", "group_by_length", "seed"),
    ),
    "its optimizer has them": (
        *("learning_rate", "weight_decay", "loraplus_lr_ratio", "loraplus_lr_embedding", "lr_groups"),
    ),
}
_FIXED = {key: reason for reason, keys in _BELONGS.items() for key in keys}
# How a run is started is no part of what it is.
_STARTED = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint")
_OF_NO_ACCOUNT = frozenset(
    {
        *("dataset_num_proc", "dataloader_num_workers", "logging_steps", "save_steps", "save_total_limit", "report_to"),
        *("run_name", "project", "sample_prompts", "sample_rows", "sample_steps", "sample_max_new_tokens"),
        *("eval_generate_rows", "eval_max_new_tokens", "eval_generate_batch_size", "eval_comparison"),
        *(
            "eval_pattern",
            "eval_metrics",
            "eval_apply_chat_template",
            "multiple_choice_dataset",
            "multiple_choice_rows",
        ),
        *("perplexity_text", "perplexity_max_length", "perplexity_stride", "perplexity_max_tokens"),
        *("harness_tasks", "harness_include_path", "harness_num_fewshot", "harness_limit"),
        *("per_device_eval_batch_size", "plan", "on_out_of_memory", "gpu_memory_limit", "stream_base", "cuda_graphs"),
    }
)
# Of no account unless something depends on which evaluation is the best.
_OF_EVALUATIONS = frozenset({"eval_dataset", "eval_steps"})
# Optimizers whose state is of one form, wherever it lies.
_SAME_STATE = {
    "paged_adamw_32bit": "adamw",
    "paged_adamw_8bit": "adamw_8bit",
    "paged_lion_32bit": "lion",
    "paged_lion_8bit": "lion_8bit",
    "adamw_torch_fused": "adamw_torch",
}


@dataclass(frozen=True)
class Change:
    """A key with another value than the run began with.

    Attributes:
        key: Of the configuration.
        before, now: Its values.
        matters: Whether what the run computes is another from here on.
    """

    key: str
    before: Any
    now: Any
    matters: bool

    def __str__(self) -> str:
        return f"{self.key} {_shown(self.before)} -> {_shown(self.now)}"


@dataclass(frozen=True)
class Resumption:
    """From where a run goes on, and what is another than before."""

    checkpoint: str
    changed: list[Change]

    def lines(self) -> list[str]:
        """For people: changes that matter first."""
        told = [f"going on from {self.checkpoint}"]
        for title, matters in (("changed, and with it the run from here on", True), ("changed", False)):
            these = [str(change) for change in self.changed if change.matters is matters]
            told += [f"  {title}: {', '.join(these)}"] if these else []
        return told


def changes(begun: RunConfig, now: RunConfig, where: Path) -> list[Change]:
    """What is another in `now` than in `begun`, both as they were asked for.

    Args:
        begun: The configuration of the checkpoint's run.
        now: That with which it goes on; its `optim` is not null where that of `begun` is not.
        where: The file of `begun`, for the message.

    Raises:
        ConfigError: Keys that cannot change, each with both values and why.
    """
    before, after = begun.model_dump(mode="json"), now.model_dump(mode="json")
    keys = [key for key in after if before[key] != after[key] and key not in _STARTED]
    keys = [key for key in keys if not _is_one_place(before[key], after[key])]
    found = [Change(key, before[key], after[key], _matters(key, begun, now)) for key in keys]
    reasons = {change.key: _reason(change.key, begun, now) for change in found}
    refused = [change for change in found if reasons[change.key] is not None]
    if refused:
        why = "; ".join(dict.fromkeys(str(reasons[change.key]) for change in refused))
        raise ConfigError(
            f"a run cannot go on with another {', '.join(change.key for change in refused)}",
            found="; ".join(map(str, refused)),
            allowed=f"as it began: of the checkpoint, {why}",
            hint=f"start a run of its own in another output_dir; where a file only moved, change its place in {where}",
        )
    return found


def _matters(key: str, begun: RunConfig, now: RunConfig) -> bool:
    if key in _OF_EVALUATIONS:
        return _seeks_best(begun) or _seeks_best(now)
    if key == "optim":
        return False  # where it may change, it is the same state
    return key not in _OF_NO_ACCOUNT


def _reason(key: str, begun: RunConfig, now: RunConfig) -> str | None:
    """Why a key that has another value cannot have it."""
    if key in ("per_device_train_batch_size", "gradient_accumulation_steps"):
        return "it is at a place in steps of so many rows" if _step_rows(begun) != _step_rows(now) else None
    if key == "optim" and begun.optim is not None and now.optim is not None:
        forms = [_SAME_STATE.get(name, name) for name in (begun.optim, now.optim)]
        return "it holds that optimizer's state" if forms[0] != forms[1] else None
    if key in ("metric_for_best_model", "greater_is_better"):
        is_other = _seeks_best(begun) and _seeks_best(now) and _best(begun) != _best(now)
        return "its best figure so far is that one" if is_other else None
    return _FIXED.get(key)


def _seeks_best(config: RunConfig) -> bool:
    return config.load_best_model_at_end or config.early_stopping_patience is not None


def _best(config: RunConfig) -> tuple[str, bool]:
    """The figure by which the best is told, and whether it is the highest."""
    metric = (config.metric_for_best_model or "loss").removeprefix("eval_")
    greater = config.greater_is_better
    return metric, not metric.endswith("loss") if greater is None else greater


def _step_rows(config: RunConfig) -> int:
    return config.per_device_train_batch_size * config.gradient_accumulation_steps


def _is_one_place(before: Any, now: Any) -> bool:
    """Whether both are one path, written in two ways."""
    return isinstance(before, str) and isinstance(now, str) and Path(before).resolve() == Path(now).resolve()


def _shown(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
