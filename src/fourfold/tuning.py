"""A search: each trial is a run of its own, in a folder of its own below the study's.

study.journal    the study, where no other storage is named
trial-NNNN/      the run folder of a trial, without its checkpoints once the trial has ended
best.yaml        the best configuration, as `fourfold train` takes it; of several objectives pareto/trial-NNNN.yaml
trials.csv, trials.json, report.html
"""

from __future__ import annotations

import contextlib
import csv
import gc
import io
import json
import os
import shutil
import signal
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from fourfold import pipeline
from fourfold.config import RunConfig
from fourfold.config import options as choices
from fourfold.config.methods import training_contradictions
from fourfold.config.search import SearchConfig, search_space, with_values
from fourfold.errors import AdapterError, ConfigError, QuantizationError, TrainingError
from fourfold.files import write_whole
from fourfold.kernels.host_memory import spare_bytes
from fourfold.memory.gpus import Gpu, gpu_present
from fourfold.memory.meter import reset_peak
from fourfold.planning import plan_for_training
from fourfold.search.page import render_study
from fourfold.search.space import SearchSpace
from fourfold.search.storage import reporting_storage
from fourfold.search.study import (
    Handle,
    Pruned,
    Refused,
    StudyOptions,
    TrialRecord,
    best_trials,
    open_study,
    records,
    run_trials,
)
from fourfold.training.checkpoint import list_checkpoints
from fourfold.training.interrupt import TrainingInterrupted
from fourfold.training.out_of_memory import OutOfMemory
from fourfold.training.pruning import PruningCallback, TrainingPruned

__all__ = ["SearchInterrupted", "SearchResult", "TrialRun", "study_options", "tune"]

JOURNAL, PAGE, BEST, PARETO = "study.journal", "report.html", "best.yaml", "pareto"
# What does not say how well a trial can do; a path may differ between the machines of one study.
_NOT_COMPARED = (
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "model_name_or_path",
    "train_dataset",
    "eval_dataset",
    "perplexity_text",
    "device",
    "gpu_memory_limit",
    "dataset_num_proc",
    "dataloader_num_workers",
    "report_to",
    "project",
)


@dataclass(frozen=True)
class SearchResult:
    """A study as it stands.

    Attributes:
        output_dir: Its folder.
        objectives: minimize or maximize, by name.
        trials: All of them, by number.
        best: Numbers of those that none beats.
        configs: Their configurations as files, by number.
        page: The page.
    """

    output_dir: Path
    objectives: dict[str, str]
    trials: list[TrialRecord]
    best: list[int]
    configs: dict[int, Path]
    page: Path

    def to_dict(self) -> dict[str, Any]:
        return {
            "output_dir": str(self.output_dir),
            "objectives": self.objectives,
            "trials": [asdict(record) for record in self.trials],
            "best": self.best,
            "configs": {str(number): str(path) for number, path in self.configs.items()},
            "page": str(self.page),
        }


def study_options(config: RunConfig, search: SearchConfig) -> StudyOptions:
    """The narrow options of a study."""
    output = Path(config.output_dir)
    kept = config.model_dump(mode="json", exclude={*_NOT_COMPARED, *search.space})
    return StudyOptions(
        name=search.study_name or output.resolve().name,
        storage=search.storage or str(output / JOURNAL),
        directions=search.directions,
        n_trials=search.n_trials,
        sampler=search.sampler,
        pruner=search.pruner,
        seed=search.seed,
        settings=kept,
    )


@dataclass(frozen=True)
class TrialRun:
    """The objective: trains with a trial's values.

    Args:
        config: The run that the values are put into.
        objectives: Names of figures.
        gpu: Where a trial is planned before it is begun; None: it is not.
        progress: As `fourfold.pipeline.train` takes it.
    """

    config: RunConfig
    objectives: tuple[str, ...]
    gpu: Gpu | None = None
    progress: str = "silent"

    def __call__(self, handle: Handle, values: dict[str, Any]) -> Mapping[str, Any]:
        """Final figures of the run.

        Raises:
            Refused: The values contradict one another or the model, or do not fit the GPU.
            Pruned: Training was left early, or could not go on with these values.
            FourfoldError: What is wrong with any trial.
        """
        folder = trial_folder(self.config, handle.number)
        try:
            config = with_values(
                self.config,
                values,
                output_dir=str(folder),
                overwrite_output_dir=True,
                resume_from_checkpoint=None,
            )
            # Raises TrainingError where nothing fits.
            plan_for_training(config, self.gpu, spare_bytes())
        except (ConfigError, TrainingError) as error:
            raise Refused(_in_a_line(error)) from error
        reset_peak(choices.device(config))
        watch = PruningCallback(self.objectives[0], handle.is_hopeless)
        try:
            return pipeline.train(config, self.progress, callbacks=[watch]).metrics
        except TrainingInterrupted as error:
            raise SearchInterrupted(error) from error
        except TrainingPruned as error:
            raise Pruned(f"after step {error.step}: {error.reason}") from error
        except OutOfMemory as error:
            raise Pruned(_in_a_line(error)) from error
        except (ConfigError, AdapterError, QuantizationError, TrainingError) as error:
            raise Refused(_in_a_line(error)) from error
        finally:
            # What a trial held is in cycles, and the next one needs the room.
            gc.collect()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()
            for checkpoint in list_checkpoints(folder):
                shutil.rmtree(checkpoint, ignore_errors=True)


class SearchInterrupted(TrainingError):  # noqa: N818 - an orderly end, not a fault
    """The search was asked to stop in the midst of a trial."""

    def __init__(self, interrupt: TrainingInterrupted) -> None:
        self.exit_code = 128 + interrupt.signal_number
        super().__init__(
            "The search was interrupted; trials that had finished are kept",
            found=signal.Signals(interrupt.signal_number).name,
            hint="the same command goes on, and tries the interrupted trial's values again",
        )


def trial_folder(config: RunConfig, number: int) -> Path:
    """The run folder of a trial."""
    return Path(config.output_dir) / f"trial-{number:04d}"


def _in_a_line(error: ConfigError | AdapterError | QuantizationError | TrainingError) -> str:
    return " ".join(part for part in (error.what, None if error.found is None else f"({error.found})") if part)


def tune(
    config: RunConfig,
    search: SearchConfig,
    progress: str = "silent",
    after: Callable[[TrialRecord], None] = lambda record: None,
) -> SearchResult:
    """Run trials of a study until it has enough, and leave its best configuration, tables and page.

    Any number of processes, on machines that see the storage, may call this at once, and again after a kill.

    Args:
        config: The run that is varied; `output_dir` is the study's folder.
        progress: Of each trial, a key of `PROGRESS`.
        after: Is given each trial that ended here.

    Raises:
        SearchInterrupted: SIGINT or SIGTERM came while a trial trained.
        ConfigError: The search space, the run or the study that is there does not fit; or there was nothing but refused
            trials.
        CheckpointError, SaveError: The storage is corrupt, locked or not to be used.
        FourfoldError: What is wrong with any trial; whatever had finished is kept.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "a trial is trained by one process",
            found=f"WORLD_SIZE {os.environ['WORLD_SIZE']}",
            hint="start the same command several times, each with its own CUDA_VISIBLE_DEVICES: all join the study",
        )
    for contradiction in training_contradictions(config):
        raise ConfigError(contradiction.what, hint=contradiction.hint)
    if config.train_dataset is None:
        raise ConfigError("train_dataset is not given", hint="name a file, a folder, or a data set on the hub")
    space, options = search_space(search), study_options(config, search)
    output = Path(config.output_dir)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output_dir {output} is a file", allowed="a folder, or a name that is free")
    output.mkdir(parents=True, exist_ok=True)
    first = {key: getattr(config, key) for key in space.entries}
    study = open_study(options, space, first)
    device = choices.device(config)
    gpu = gpu_present(device, choices.memory_limit(config)) if device.type == "cuda" else None

    def told(record: TrialRecord) -> None:
        _write_tables(output, records(study, options, space), options)
        _write_best(config, records(study, options, space), best_trials(study), options)
        after(record)

    try:
        run_trials(study, options, space, TrialRun(config, tuple(options.directions), gpu, progress), told)
    except BaseException:
        # Whatever ended it is told, and not what it may entail.
        with contextlib.suppress(Exception):
            _finish(config, study, options, space)
        raise
    with reporting_storage(options.storage):
        result = _finish(config, study, options, space)
    if not result.best:
        reasons = [record.reason for record in result.trials if record.reason]
        raise ConfigError(
            f"none of {len(result.trials)} trials finished",
            found=max(reasons, key=reasons.count) if reasons else None,
            hint=f"see {result.page}",
        )
    return result


def _finish(config: RunConfig, study: Any, options: StudyOptions, space: SearchSpace) -> SearchResult:
    output = Path(config.output_dir)
    found, best = records(study, options, space), best_trials(study)
    _write_tables(output, found, options)
    configs = _write_best(config, found, best, options)
    _write(output / PAGE, render_study(study, options.directions, found, best))
    return SearchResult(output, dict(options.directions), found, best, configs, output / PAGE)


def _write(path: Path, text: str) -> None:
    # Another worker may be writing the same at this moment.
    with contextlib.suppress(FileNotFoundError):
        write_whole(path, text)


def _write_tables(output: Path, found: list[TrialRecord], options: StudyOptions) -> None:
    _write(output / "trials.json", json.dumps([asdict(record) for record in found], indent=2, default=str) + "\n")
    keys = list(dict.fromkeys(key for record in found for key in record.params))
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(["trial", "outcome", *options.directions, *keys, "seconds", "retry_of", "reason"])
    for record in found:
        figures = [record.values.get(name) for name in options.directions]
        values = [record.params.get(key) for key in keys]
        table.writerow(
            [record.number, record.outcome, *figures, *values, record.seconds, record.retry_of, record.reason]
        )
    _write(output / "trials.csv", text.getvalue())


def _write_best(config: RunConfig, found: list[TrialRecord], best: list[int], options: StudyOptions) -> dict[int, Path]:
    """The configurations of the best trials as files, by number; they train into a folder of their own."""
    output = Path(config.output_dir)
    is_one = len(options.directions) == 1
    files = {number: output / (BEST if is_one else f"{PARETO}/trial-{number:04d}.yaml") for number in best}
    if not is_one:
        (output / PARETO).mkdir(exist_ok=True)
        for old in set((output / PARETO).glob("trial-*.yaml")) - set(files.values()):
            old.unlink(missing_ok=True)
    for number, path in files.items():
        record = found[number]
        chosen = with_values(config, record.params, output_dir=str(path.with_suffix("")))
        figures = ", ".join(f"{name} {value:.6g}" for name, value in record.values.items())
        searched = yaml.safe_dump(record.params, default_flow_style=True, width=10**6, sort_keys=False).strip()
        _write(path, f"# Trial {number} of {options.name}: {figures}\n# Searched: {searched}\n{chosen.to_yaml()}")
    return files
