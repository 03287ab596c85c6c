"""The model card of a run, from its configuration and what was measured."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fourfold.config.datasets import name_of
from fourfold.config.run import RunConfig
from fourfold.data import DataReport
from fourfold.data.streamed import StreamReport
from fourfold.training.run_folder import ModelCard

__all__ = ["model_card"]


def model_card(
    config: RunConfig,
    output: Path,
    train_report: DataReport | StreamReport,
    eval_reports: Mapping[str, DataReport],
    metrics: dict[str, Any],
) -> ModelCard:
    """What `write_model_card` writes: how the run was made, on which rows, and what it reached."""
    values = config.model_dump()

    def chosen(*prefixes: str) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key.startswith(prefixes) and value is not None}

    data: dict[str, Any] = {"train_dataset": name_of(config.train_dataset or "")}
    if isinstance(train_report, StreamReport):
        data["streamed in blocks of"] = train_report.buffer_size
    else:
        data["training rows"] = train_report.rows_kept
        data[f"rows above max_length ({config.overlong})"] = train_report.rows_overlong
    for name, report in eval_reports.items():
        of = f" ({name})" if name else ""
        data |= {
            f"held out{of}": report.name if config.eval_dataset else "a part of train_dataset",
            f"held-out rows{of}": report.rows_kept,
        }
    return ModelCard(
        name=output.resolve().name,
        base_model=config.model_name_or_path,
        data=data,
        quantization=chosen("load_in_4bit", "load_in_8bit", "llm_int8_", "bnb_", "quantize_", "modules_to_not"),
        lora=chosen("lora_", "use_", "target_", "init_lora", "loftq_", "modules_to_save", "adapter_weight"),
        hyperparameters={
            **chosen("num_train", "max_steps", "per_device_train", "gradient_", "learning_", "lr_", "warmup_"),
            **chosen("weight_decay", "max_grad", "optim", "seed", "max_length", "packing", "train_on_prompt"),
        },
        results=metrics,
        command=shlex.join(["fourfold", "train", f"{output}/config.yaml", "--output_dir", f"{output}-again"]),
    )
