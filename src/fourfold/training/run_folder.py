"""The run folder: what a run leaves behind, so that it can be read, drawn, used and made again.

config.yaml      the configuration as it was resolved
metrics.jsonl    one JSON object a line for each log
samples.jsonl    one JSON object a line for each answer given while it trained: step, prompt, answer, reference
loss.png         training and validation loss by step
report.html      the page of the run; events.jsonl, answers.jsonl and samples.jsonl are what else it is made of
adapter/         PEFT's own format, the tokenizer and its chat template; or, where all of the model was trained,
model/           Transformers' own format, with the same
README.md        the model card: how it was made
checkpoint-N/    see fourfold.training.checkpoint
base/            the base, where the run changed it
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any

import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from peft import PeftModel
from torch import Tensor
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from fourfold.errors import CheckpointError
from fourfold.files import whole_folder, write_whole
from fourfold.training.evaluation_sets import loss_names

__all__ = [
    "MetricsCallback",
    "ModelCard",
    "append_metrics",
    "draw_loss",
    "installed_versions",
    "mean_loss",
    "metrics_record",
    "read_metrics",
    "result_folder",
    "save_adapter",
    "save_model",
    "write_config",
    "write_metrics",
    "write_model_card",
]

CONFIG_FILE = "config.yaml"
METRICS_FILE = "metrics.jsonl"
LOSS_PICTURE = "loss.png"
ADAPTER_FOLDER = "adapter"
MODEL_FOLDER = "model"
RESULTS = (ADAPTER_FOLDER, MODEL_FOLDER)
EVENTS_FILE = "events.jsonl"
ANSWERS_FILE = "answers.jsonl"
SAMPLES_FILE = "samples.jsonl"
PAGE_FILE = "report.html"
RECORDS = (EVENTS_FILE, ANSWERS_FILE, SAMPLES_FILE, PAGE_FILE)
CARD_FILE = "README.md"

# Of the losses on held-out rows, each set's own.
_COLORS = ("#ff725c", "#3ca951", "#efb118", "#a463f2", "#6cc5b0", "#9c6b4e")
_PACKAGES = ("fourfold", "torch", "transformers", "peft", "trl", "datasets", "safetensors")


def result_folder(adapter: str | None) -> str:
    """Name of the folder of what a run trains: an adapter of that kind, or the whole model."""
    return MODEL_FOLDER if adapter is None else ADAPTER_FOLDER


def write_config(run_folder: Path, config: str | Mapping[str, Any]) -> Path:
    """Write the resolved configuration, YAML text or a mapping that YAML can hold."""
    text = config if isinstance(config, str) else _yaml(config)
    run_folder.mkdir(parents=True, exist_ok=True)
    path = run_folder / CONFIG_FILE
    write_whole(path, text)
    return path


def _yaml(values: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)
    return text


def metrics_record(step: int, logs: Mapping[str, Any]) -> dict[str, Any]:
    """One log event as JSON can hold it; a number that is not finite becomes null."""
    record: dict[str, Any] = {"step": step}
    for key, value in logs.items():
        record[key] = None if isinstance(value, float) and not math.isfinite(value) else value
    return record


def append_metrics(path: Path, record: Mapping[str, Any]) -> None:
    """Add one line to a metrics file, or to one of samples."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, allow_nan=False) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics file, in order; a last line cut short by a crash is left out.

    Raises:
        CheckpointError: Another line is not JSON; the message names it.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            if number < len(lines):
                raise CheckpointError(f"{path}, line {number} is not JSON", found=line[:80]) from error
    return records


def write_metrics(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Put these records in place of all that a metrics file holds, whole or not at all."""
    write_whole(path, "".join(json.dumps(record, allow_nan=False) + "\n" for record in records))


class MetricsCallback(TrainerCallback):
    """Writes each log into the run folder's metrics file.

    A run that goes on from a checkpoint begins with the log that the checkpoint holds: whatever was written after it
    will be written again.
    """

    def __init__(self, run_folder: Path) -> None:
        self.path = run_folder / METRICS_FILE

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_metrics(self.path, [metrics_record(logs["step"], logs) for logs in state.log_history])

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        record = metrics_record(state.global_step, logs)
        if "train_loss" in record:
            # The Trainer's own is of the steps since a resume.
            record["train_loss"] = mean_loss(state.log_history)
        append_metrics(self.path, record)


def mean_loss(records: Sequence[Mapping[str, Any]]) -> float | None:
    """The training loss over all steps of a run's log; None where there is none."""
    total, last_step = 0.0, 0
    for record in records:
        if record.get("loss") is not None:
            # Each logged loss is the mean over the steps since the one before.
            total, last_step = total + record["loss"] * (record["step"] - last_step), record["step"]
    return total / last_step if last_step else None


def draw_loss(path: Path, records: Sequence[Mapping[str, Any]], title: str = "") -> Path:
    """Draw training and validation loss by optimizer step.

    Args:
        path: The picture; its suffix chooses the format.
        records: As `read_metrics` gives them.
    """
    train = [(r["step"], r["loss"]) for r in records if r.get("loss") is not None]
    validation: dict[str, list[tuple[int, float]]] = {}
    for record in records:
        for key, name in loss_names(record).items():
            validation.setdefault(name, []).append((record["step"], record[key]))
    figure = Figure(figsize=(7.2, 4.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        axes.plot(*zip(*train, strict=True), color="#4269d0", linewidth=1.6, label="training")
    for (name, points), color in zip(validation.items(), cycle(_COLORS), strict=False):
        label = f"validation: {name}" if name else "validation"
        axes.plot(*zip(*points, strict=True), color=color, linewidth=1.6, marker="o", markersize=4.5, label=label)
        step, loss = points[-1]
        axes.annotate(f"{loss:.3f}", (step, loss), (0, 8), textcoords="offset points", ha="center", color=color)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss per token (nats)")
    if title:
        axes.set_title(title, loc="left", fontsize=11)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if train or validation:
        axes.legend(frameon=False)
    figure.savefig(path)
    return path


def save_adapter(
    run_folder: Path,
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """Save the adapter with its tokenizer and chat template, whole or not at all.

    Args:
        weights: The trained parameters by name, where the model holds but a part of them; None: the model's.

    Raises:
        SaveError: The disk is full; an adapter saved earlier is untouched.
    """
    path = run_folder / ADAPTER_FOLDER
    with whole_folder(path) as partial:
        model.save_pretrained(partial, **({} if weights is None else {"state_dict": dict(weights)}))
        tokenizer.save_pretrained(partial)
        # PEFT's card is a form to fill in; `write_model_card` puts a filled one there.
        (partial / CARD_FILE).unlink(missing_ok=True)
    return path


def save_model(
    run_folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """Save a model of which all was trained, with its tokenizer and chat template, whole or not at all.

    Args:
        weights: As in `save_adapter`.

    Raises:
        SaveError: The disk is full; a model saved earlier is untouched.
    """
    path = run_folder / MODEL_FOLDER
    with whole_folder(path) as partial:
        model.save_pretrained(partial, **({} if weights is None else {"state_dict": dict(weights)}))
        tokenizer.save_pretrained(partial)
    return path


def installed_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide a run's numbers."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What a model card says. Each mapping becomes a table of its keys and values, as they are.

    Attributes:
        name: The title.
        base_model: The name or path of the base model.
        data: Where the rows came from, how many were trained on, evaluated on and left out.
        quantization, lora, hyperparameters: As configured.
        results: What was measured, such as losses, exact match, memory and time.
        command: What was run.
    """

    name: str
    base_model: str
    data: Mapping[str, Any]
    quantization: Mapping[str, Any]
    lora: Mapping[str, Any]
    hyperparameters: Mapping[str, Any]
    results: Mapping[str, Any]
    command: str
    versions: Mapping[str, str] = field(default_factory=installed_versions)


def write_model_card(run_folder: Path, card: ModelCard) -> Path:
    """Write the model card as Markdown under the Hub's metadata header."""
    result = next((name for name in (MODEL_FOLDER, ADAPTER_FOLDER) if (run_folder / name).is_dir()), ADAPTER_FOLDER)
    is_adapter = result == ADAPTER_FOLDER
    header = {
        "base_model": card.base_model,
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["fourfold", *(["lora", "qlora"] if is_adapter else [])],
    }
    kind, form = ("A LoRA adapter for", "PEFT") if is_adapter else ("All weights of", "Transformers")
    sections = {
        "Results": card.results,
        "Data": card.data,
        "Quantization": card.quantization,
        "LoRA": card.lora,
        "Hyperparameters": card.hyperparameters,
        "Versions": card.versions,
    }
    loss = [f"![loss by step]({LOSS_PICTURE})"] if (run_folder / LOSS_PICTURE).exists() else []
    lines = [
        f"---\n{_yaml(header)}---",
        "",
        f"# {card.name}",
        "",
        f"{kind} `{card.base_model}`, trained by fourfold. "
        f"The {'adapter' if is_adapter else 'model'} stands in `{result}/` in {form}'s own format; "
        f"`{CONFIG_FILE}` is the whole configuration.",
        "",
        *loss,
        "",
        "## Made by",
        "",
        f"```\n{card.command}\n```",
        "",
    ]
    for title, values in sections.items():
        if values:
            rows = [f"| {key} | {_cell(value)} |" for key, value in values.items()]
            lines += [f"## {title}", "", "| | |", "|---|---|", *rows, ""]
    path = run_folder / CARD_FILE
    path.write_text("\n".join(lines), encoding="utf-8")
    if (run_folder / result).is_dir():
        # That is what people pass on: it takes its card along, without the picture that stays here.
        text = "\n".join(line for line in lines if line not in loss)
        (run_folder / result / CARD_FILE).write_text(text, encoding="utf-8")
    return path


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return str(value).replace("|", "\\|").replace("\n", " ")
