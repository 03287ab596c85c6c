"""What a run leaves of itself beside its log, and the page that shows all of it.

events.jsonl     what happened to the run, see `fourfold.training.journal`
answers.jsonl    held-out rows that were answered at the end, one JSON object a line
samples.jsonl    answers to prompts while it trained, likewise: step, prompt, answer, reference
report.html      the page, written from the folder alone
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from fourfold.config import RunConfig, load_config
from fourfold.config.datasets import name_of
from fourfold.config.run import GROUPS
from fourfold.data import DataReport
from fourfold.data.streamed import StreamReport
from fourfold.environment import Environment, gather
from fourfold.errors import CheckpointError, FourfoldError
from fourfold.evaluation import Sample
from fourfold.files import write_whole
from fourfold.models.size import ModelSize
from fourfold.report import Answer, Event, RunRecord, Setting, TextSample, render
from fourfold.training.journal import Journal, read_lines
from fourfold.training.run_folder import (
    ANSWERS_FILE,
    CONFIG_FILE,
    EVENTS_FILE,
    METRICS_FILE,
    PAGE_FILE,
    SAMPLES_FILE,
)

__all__ = ["Recorder", "read_run", "write_page"]

logger = logging.getLogger(__name__)

# The page of a long run takes a moment: it is written anew where that takes no more than this share of the time.
_SHARE_OF_TIME = 0.02


class Recorder:
    """Keeps the account of a run while it runs, and its page up to date.

    Args:
        output: The run folder.
        is_main: Whether this process writes; of several, one does.
    """

    def __init__(self, output: Path, *, is_main: bool = True) -> None:
        self.output = output
        self.is_main = is_main
        self.journal = Journal(output)
        self._next_page = 0.0

    def begin(
        self,
        checkpoint: Path | None,
        data: Mapping[str, DataReport | StreamReport],
        size: ModelSize,
        planned: Mapping[str, int],
    ) -> None:
        """The run begins, or goes on from a checkpoint.

        Args:
            data: The account of each set of rows, by its title.
            size: The base model's.
            planned: Memory by part, as `fourfold.measuring.planned_memory` gives it.
        """
        if not self.is_main:
            return
        environment = gather()
        self.journal.open(
            _step_of(checkpoint),
            versions={"python": environment.python} | {k: v for k, v in environment.versions.items() if v},
            machine=_machine(environment),
            data={title: asdict(report) for title, report in data.items()},
            model=size.to_dict(),
            planned=dict(planned),
        )
        self.refresh()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Around training: whatever ends it early is noted, and the page says so."""
        if not self.is_main:
            yield
            return
        try:
            with self.journal.watching():
                yield
        except BaseException:
            self.refresh()
            raise

    def step_down(self, checkpoint: Path | None, planned: Mapping[str, int]) -> None:
        """The run goes on with another plan."""
        if self.is_main:
            self.journal.note("step_down", _step_of(checkpoint), planned=dict(planned))

    def end(self, step: int, metrics: Mapping[str, Any], samples: Sequence[Sample]) -> None:
        """The run has come to its end."""
        if not self.is_main:
            return
        if samples:
            lines = (json.dumps(asdict(sample)) for sample in samples)
            write_whole(self.output / ANSWERS_FILE, "".join(f"{line}\n" for line in lines))
        self.journal.note("end", step, metrics=dict(metrics))
        self.refresh()

    def refresh(self, *, is_due: bool = False) -> None:
        """Write the page anew. A page that cannot be written ends no run.

        Args:
            is_due: Only where the last one was long enough ago for the time that it took.
        """
        began = time.monotonic()
        if is_due and began < self._next_page:
            return
        try:
            write_page(self.output)
        except Exception:
            logger.warning("%s was not written", self.output / PAGE_FILE, exc_info=True)
        ended = time.monotonic()
        self._next_page = ended + (ended - began) / _SHARE_OF_TIME

    def callback(self) -> TrainerCallback:
        """Refreshes the page after an evaluation and a checkpoint, and after the first log."""
        return _Refreshing(lambda: self.refresh(is_due=True))


class _Refreshing(TrainerCallback):
    def __init__(self, refresh: Callable[[], None]) -> None:
        self._refresh = refresh

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._refresh()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            self._refresh()


def _step_of(checkpoint: Path | None) -> int:
    if checkpoint is None:
        return 0
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    return int(state["global_step"])


def _machine(environment: Environment) -> dict[str, str]:
    machine = {
        "system": environment.os,
        "processor": f"{environment.cpu}, {environment.cpu_cores} cores",
        "memory": f"{environment.memory_bytes / 2**30:.1f} GiB",
    }
    for index, gpu in enumerate(environment.gpus):
        machine[f"GPU {index}"] = f"{gpu.name}, {gpu.memory_bytes / 2**30:.1f} GiB, driver {gpu.driver}"
    machine["torch built for"] = f"GPU ({environment.torch_cuda})" if environment.torch_cuda else "CPU"
    return machine


def write_page(run: Path) -> Path:
    """Write the page of a run from its folder, and give its path. Raises as `read_run`, and OSError."""
    page = run / PAGE_FILE
    write_whole(page, render(read_run(run)))
    return page


def read_run(run: Path) -> RunRecord:
    """A run as its folder tells it. What is missing is left out; what cannot be read is named.

    Raises:
        CheckpointError: There is neither a configuration nor a log.
    """
    files = (CONFIG_FILE, METRICS_FILE, EVENTS_FILE)
    if not any((run / name).is_file() for name in files):
        raise CheckpointError(f"no run at {run}", allowed=f"a folder with {' or '.join(files)}, as train leaves it")
    faults: list[str] = []
    lines: dict[str, list[dict[str, Any]]] = {}
    for name in (METRICS_FILE, EVENTS_FILE, SAMPLES_FILE, ANSWERS_FILE):
        lines[name], num_broken = read_lines(run / name)
        if num_broken:
            faults.append(f"{name}: {num_broken:,} {'line' if num_broken == 1 else 'lines'} could not be read")
    metrics = [record for record in lines[METRICS_FILE] if _is_number(record.get("step"))]
    events = [_event(fields) for fields in lines[EVENTS_FILE]]
    began = next((event for event in reversed(events) if event.name in ("begin", "resume")), None)
    ended = events[-1].fields if events and events[-1].name == "end" else {}
    planning = [event.fields for event in events if event.name in ("begin", "resume", "step_down")]
    settings, described = _read_config(run, faults)
    return RunRecord(
        name=run.resolve().name,
        **described,
        metrics=metrics,
        figures=_numbers(ended.get("metrics")),
        planned=_numbers(planning[-1].get("planned")) if planning else {},
        events=events,
        updated=_written(run / METRICS_FILE),
        samples=[sample for line in lines[SAMPLES_FILE] if (sample := _text_sample(line))],
        answers=[answer for line in lines[ANSWERS_FILE] if (answer := _answer(line))],
        settings=settings,
        data_reports=[
            (title, fields)
            for title, fields in _mapping(began.fields.get("data") if began else None).items()
            if isinstance(fields, Mapping)
        ],
        versions=_texts(began.fields.get("versions") if began else None),
        machine=_texts(began.fields.get("machine") if began else None),
        faults=faults,
    )


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _mapping(value: object) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _numbers(value: object) -> dict[str, Any]:
    return {key: number for key, number in _mapping(value).items() if _is_number(number)}


def _texts(value: object) -> dict[str, str]:
    return {str(key): str(text) for key, text in _mapping(value).items()}


def _written(path: Path) -> datetime | None:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC) if path.is_file() else None


def _event(fields: dict[str, Any]) -> Event:
    try:
        at = datetime.fromisoformat(str(fields.get("time"))).astimezone(UTC)
    except ValueError:
        at = None
    step = fields.get("step")
    at_step = int(step) if isinstance(step, (int, float)) else None
    rest = {key: value for key, value in fields.items() if key not in ("time", "event", "step")}
    return Event(str(fields.get("event")), at, at_step, rest)


def _turns(prompt: object) -> tuple[dict[str, str], ...]:
    """A prompt, which is a text or messages."""
    if isinstance(prompt, list):
        messages = [_mapping(message) for message in prompt]
        return tuple({"role": str(m.get("role", "")), "content": str(m.get("content", ""))} for m in messages)
    return ({"role": "prompt", "content": str(prompt)},)


def _text_sample(line: Mapping[str, Any]) -> TextSample | None:
    if not _is_number(line.get("step")):
        return None
    reference = line.get("reference")
    wanted = None if reference is None else str(reference)
    return TextSample(int(line["step"]), _turns(line.get("prompt", "")), str(line.get("answer", "")), wanted)


def _answer(line: Mapping[str, Any]) -> Answer | None:
    if "answer" not in line:
        return None
    texts = str(line.get("expected", "")), str(line["answer"])
    return Answer(_turns(line.get("prompt", "")), *texts, bool(line.get("correct")))


def _read_config(run: Path, faults: list[str]) -> tuple[list[Setting], dict[str, str]]:
    """The settings, and model, data and method in words."""
    path = run / CONFIG_FILE
    if not path.is_file():
        faults.append(f"{CONFIG_FILE} is missing")
        return [], {"model": run.resolve().name, "data": "", "method": ""}
    try:
        config = load_config(run)
    except FourfoldError as error:
        # Such as one with a key that this version does not know: shown as it is.
        faults.append(f"{CONFIG_FILE}: {error.what}")
        try:
            values = _mapping(yaml.safe_load(path.read_text(encoding="utf-8", errors="replace")))
        except yaml.YAMLError:
            values = {}
        settings = [Setting("Configuration", str(key), _yaml(value), _yaml(value)) for key, value in values.items()]
        name = str(values.get("model_name_or_path", run.resolve().name))
        return settings, {"model": Path(name).name, "data": "", "method": ""}
    return _settings(config), {
        "model": _model_name(config.model_name_or_path),
        "data": name_of(config.train_dataset or ""),
        "method": _method(config),
    }


def _model_name(path: str) -> str:
    """A hub's name as it is; of a folder, its own name."""
    return path if path.count("/") == 1 and not path.startswith((".", "/", "~")) else Path(path).name


def _settings(config: RunConfig) -> list[Setting]:
    values = config.model_dump(mode="json")
    # Some defaults follow from other keys, as those of a run of so many steps do.
    like = {key: getattr(config, key) for key in ("model_name_or_path", "max_steps", "warmup_steps")}
    defaults = RunConfig(**like).model_dump(mode="json") | {"max_steps": None, "warmup_steps": None}
    group = ""
    settings = []
    for key, field in RunConfig.model_fields.items():
        group = GROUPS.get(key, group)
        default = None if field.is_required() else _yaml(defaults[key])
        settings.append(Setting(group, key, _yaml(values[key]), default))
    return settings


def _yaml(value: object) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True, sort_keys=False)
    return text.removesuffix("\n").removesuffix("\n...")


def _method(config: RunConfig) -> str:
    """As "QLoRA (nf4, rank 16), DPO"."""
    bits = config.bnb_4bit_quant_type if config.load_in_4bit else "int8" if config.load_in_8bit else None
    if config.adapter is None:
        how = "Full fine-tuning"
    elif bits:
        how = f"QLoRA ({bits}, rank {config.lora_r})"
    else:
        how = f"LoRA (rank {config.lora_r})"
    if config.method == "sft":
        return how
    return f"{'Reward model' if config.method == 'reward' else config.method.upper()} by {how}"
