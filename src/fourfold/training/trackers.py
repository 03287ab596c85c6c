"""The trackers that a run's metrics go to besides its folder, by the Trainer's callbacks for them.

Beyond those callbacks: the project by one key, answers (`samples.py`), and what is measured when training has ended. A
new tracker is one row of `TRACKERS`; each imports its package when it is first used.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from transformers import Trainer, TrainerCallback, TrainerState, TrainingArguments
from transformers.integrations import MLflowCallback, TensorBoardCallback, TrackioCallback, WandbCallback

from fourfold.errors import ConfigError
from fourfold.training.samples import Answer

__all__ = ["TRACKERS", "Tracker", "require_trackers", "send_final", "send_samples", "tracking", "without_trackers"]

COLUMNS = ("step", "prompt", "answer", "reference")
STEP = "train/global_step"


class Tracker(NamedTuple):
    """A tracker of `report_to`.

    Attributes:
        packages: What `pip install` names it, and Python; one of them is enough.
        callback: The Trainer's.
        samples: Given that callback and the answers of one step, sends them.
        final: Given that callback, its arguments, a step and figures, sends what was measured of it after training.
        variable: Environment variable that names the project; None: it has none, or is told otherwise.
        abandon: Ends what an error, or the end of training, has left open.
    """

    packages: tuple[str, ...]
    callback: type[TrainerCallback]
    samples: Callable[[Any, Sequence[Answer]], None]
    final: Callable[[Any, TrainingArguments, int, Mapping[str, float]], None]
    variable: str | None = None
    abandon: Callable[[bool], None] | None = None


def _rows(answers: Sequence[Answer]) -> list[list[Any]]:
    return [[answer.step, answer.last_turn(), answer.answer, answer.reference or ""] for answer in answers]


def _markdown(answer: Answer) -> str:
    wanted = f"\n\n**wanted**\n\n{answer.reference}" if answer.reference is not None else ""
    return f"**prompt**\n\n{answer.last_turn()}\n\n**answer**\n\n{answer.answer}{wanted}"


# ---- TensorBoard ----


def _tensorboard_samples(callback: Any, answers: Sequence[Answer]) -> None:
    for number, answer in enumerate(answers, start=1):
        callback.tb_writer.add_text(f"samples/{number}", _markdown(answer), answer.step)


def _tensorboard_final(callback: Any, _: TrainingArguments, step: int, figures: Mapping[str, float]) -> None:
    from torch.utils.tensorboard import SummaryWriter

    # The callback's own is closed when training ends.
    with SummaryWriter(callback.logging_dir) as writer:
        for name, value in figures.items():
            writer.add_scalar(f"final/{name}", value, step)


# ---- W&B ----


def _wandb_samples(_: Any, answers: Sequence[Answer]) -> None:
    import wandb

    wandb.log({"samples": wandb.Table(columns=list(COLUMNS), data=_rows(answers)), STEP: answers[0].step})


def _wandb_final(_: Any, _args: TrainingArguments, step: int, figures: Mapping[str, float]) -> None:
    import wandb

    if wandb.run is not None:
        wandb.run.summary.update({f"final/{name}": value for name, value in figures.items()} | {"final/step": step})


def _wandb_abandon(is_well: bool) -> None:
    import wandb

    wandb.finish(exit_code=0 if is_well else 1)


# ---- trackio ----


def _trackio_samples(_: Any, answers: Sequence[Answer]) -> None:
    import pandas as pd
    import trackio

    table = pd.DataFrame(_rows(answers), columns=list(COLUMNS))
    trackio.log({"samples": trackio.Table(dataframe=table), STEP: answers[0].step})


def _trackio_final(_: Any, args: TrainingArguments, step: int, figures: Mapping[str, float]) -> None:
    import trackio

    # The callback ends its run when training ends; a run of the same name goes on.
    trackio.init(project=args.project, name=args.run_name, resume="must")
    trackio.log({f"final/{name}": value for name, value in figures.items()} | {STEP: step})
    trackio.finish()


# ---- MLflow ----


def _mlflow_samples(_: Any, answers: Sequence[Answer]) -> None:
    import mlflow

    text = "\n\n---\n\n".join(map(_markdown, answers))
    mlflow.log_text(text, f"samples/step-{answers[0].step}.md")


def _mlflow_final(_: Any, _args: TrainingArguments, step: int, figures: Mapping[str, float]) -> None:
    import mlflow

    run = mlflow.last_active_run()
    if run is not None:
        for name, value in figures.items():
            mlflow.MlflowClient().log_metric(run.info.run_id, f"final/{name}", value, step=step)


def _mlflow_abandon(is_well: bool) -> None:
    import mlflow

    mlflow.end_run("FINISHED" if is_well else "FAILED")


TRACKERS: dict[str, Tracker] = {
    "tensorboard": Tracker(
        ("tensorboard", "tensorboardX"), TensorBoardCallback, _tensorboard_samples, _tensorboard_final
    ),
    "wandb": Tracker(("wandb",), WandbCallback, _wandb_samples, _wandb_final, "WANDB_PROJECT", _wandb_abandon),
    "trackio": Tracker(("trackio",), TrackioCallback, _trackio_samples, _trackio_final),
    "mlflow": Tracker(
        ("mlflow",), MLflowCallback, _mlflow_samples, _mlflow_final, "MLFLOW_EXPERIMENT_NAME", _mlflow_abandon
    ),
}


def require_trackers(names: Iterable[str]) -> None:
    """Raises ConfigError, saying what to install, for trackers that are not installed."""
    missing = [name for name in names if not any(importlib.util.find_spec(one) for one in TRACKERS[name].packages)]
    if missing:
        raise ConfigError(
            "report_to names trackers that are not installed",
            found=", ".join(missing),
            hint=f"pip install {' '.join(missing)}, or leave them out",
        )


def _of(callbacks: Iterable[TrainerCallback]) -> Iterator[tuple[TrainerCallback, Tracker]]:
    for callback in callbacks:
        for tracker in TRACKERS.values():
            if isinstance(callback, tracker.callback):
                yield callback, tracker


def send_samples(
    callbacks: Iterable[TrainerCallback],
) -> Callable[[TrainerState, list[Answer]], None]:
    """What sends answers to the trackers among a trainer's callbacks."""

    def send(state: TrainerState, answers: list[Answer]) -> None:
        for callback, tracker in _of(callbacks):
            tracker.samples(callback, answers)

    return send


def send_final(trainer: Trainer, step: int, figures: Mapping[str, Any]) -> None:
    """Send what was measured when training had ended, as final/NAME, to a trainer's trackers.

    Args:
        trainer: It has trained.
        step: The optimizer step of what was measured.
        figures: By name; those that are no numbers are left out.
    """
    numbers = {name: float(value) for name, value in figures.items() if isinstance(value, (int, float))}
    if trainer.is_world_process_zero():
        for callback, tracker in _of(trainer.callback_handler.callbacks):
            tracker.final(callback, trainer.args, step, numbers)


@contextlib.contextmanager
def without_trackers(trainer: Trainer) -> Iterator[None]:
    """Within, a trainer's logs go to no tracker: after training, MLflow's would begin a run of their own."""
    callbacks = [callback for callback, _ in _of(trainer.callback_handler.callbacks)]
    for callback in callbacks:
        trainer.remove_callback(callback)
    try:
        yield
    finally:
        for callback in callbacks:
            trainer.add_callback(callback)


@contextlib.contextmanager
def tracking(names: Sequence[str], project: str | None) -> Iterator[None]:
    """Within, trackers find their project; after it, none is left open that was not open before.

    Args:
        names: Those of the run.
        project: What it is called; None: as the environment has it.
    """
    variables = [TRACKERS[name].variable for name in names]
    before = {name: os.environ.get(name) for name in variables if name is not None and project is not None}
    open_before = _open_runs()
    os.environ.update(dict.fromkeys(before, project or ""))
    is_well = False
    try:
        yield
        is_well = True
    finally:
        for name in (_open_runs() & set(names)) - open_before:
            if (abandon := TRACKERS[name].abandon) is not None:
                abandon(is_well)
        for variable, value in before.items():
            if value is None:
                os.environ.pop(variable, None)
            else:
                os.environ[variable] = value


def _open_runs() -> set[str]:
    """Trackers that are imported and have a run under way."""
    wandb, mlflow = sys.modules.get("wandb"), sys.modules.get("mlflow")
    is_open = {
        "wandb": getattr(wandb, "run", None) is not None,
        "mlflow": mlflow is not None and mlflow.active_run() is not None,
    }
    return {name for name, value in is_open.items() if value}
