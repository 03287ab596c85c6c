"""A study: its trials, one after the other, by as many workers as like to, until there are enough.

The objective is a callable. What a trial may end by:

finished     it gave its figures
pruned       it was left early, since it did worse than others
refused      it was not even begun: it does not fit the GPU, or contradicts itself
failed       its worker was killed, interrupted or met an error; its parameters are tried again
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import optuna
from optuna import Study, Trial
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, NSGAIISampler, RandomSampler, TPESampler
from optuna.study import StudyDirection
from optuna.trial import FrozenTrial, TrialState

from fourfold.errors import ConfigError
from fourfold.search.space import SearchSpace
from fourfold.search.storage import open_storage, reporting_storage
from fourfold.search.workers import OUTCOME, REASON, RETRY_OF, beating, drop, is_alive, retire_abandoned

__all__ = [
    "PRUNERS",
    "SAMPLERS",
    "Handle",
    "Objective",
    "Pruned",
    "Refused",
    "StudyOptions",
    "TrialRecord",
    "best_trials",
    "open_study",
    "records",
    "run_trials",
]

_IDENTITY = "fourfold"
_MIN_STARTUP, _MAX_STARTUP = 4, 10


@dataclass(frozen=True, kw_only=True)
class StudyOptions:
    """What a study is.

    Args:
        name: In its storage.
        storage: As `open_storage` takes it.
        directions: "minimize" or "maximize", by objective.
        n_trials: Finished trials of all workers together, pruned and refused ones included.
        sampler, pruner: Keys of `SAMPLERS` and `PRUNERS`.
        seed: Of the sampler; what is drawn follows from it, the trial's number and the trials before.
        settings: Plain data that has to be the same for trials to be compared.
    """

    name: str
    storage: str
    directions: Mapping[str, str]
    n_trials: int = 20
    sampler: str = "tpe"
    pruner: str = "median"
    seed: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_startup(self) -> int:
        """Trials drawn at random, and never pruned, before the sampler learns from them: of a few trials, few."""
        return min(_MAX_STARTUP, max(_MIN_STARTUP, self.n_trials // 4))


SAMPLERS: dict[str, Callable[[StudyOptions, int], BaseSampler]] = {
    "tpe": lambda options, seed: TPESampler(seed=seed, n_startup_trials=options.num_startup, constant_liar=True),
    "nsgaii": lambda options, seed: NSGAIISampler(seed=seed, population_size=max(2, options.num_startup)),
    "random": lambda options, seed: RandomSampler(seed=seed),
}
PRUNERS: dict[str, Callable[[StudyOptions], BasePruner]] = {
    "median": lambda options: MedianPruner(n_startup_trials=options.num_startup),
    "hyperband": lambda options: HyperbandPruner(),
    "none": lambda options: NopPruner(),
}


class Refused(Exception):  # noqa: N818 - a trial's end, not a fault
    """The objective's word for a trial that is not begun."""


class Pruned(Exception):  # noqa: N818 - likewise
    """The objective's word for a trial that was left early."""


@dataclass(frozen=True)
class Handle:
    """What an objective has of its trial."""

    number: int
    _trial: Trial
    _prunes: bool

    def is_hopeless(self, step: int, value: float) -> bool:
        """Report the objective's value at a step; whether the trial is better left."""
        if not self._prunes:
            return False
        self._trial.report(value, step)
        return bool(self._trial.should_prune())


class Objective(Protocol):
    """Runs a trial with these values, and gives figures by name. Raises Refused, Pruned, or what ends the worker."""

    def __call__(self, handle: Handle, values: dict[str, Any]) -> Mapping[str, Any]: ...


@dataclass(frozen=True)
class TrialRecord:
    """A trial as a study tells it.

    Attributes:
        outcome: finished, pruned, refused, failed, running or waiting.
        values: By objective; empty unless it finished.
        params: Values by key.
        reason: Why it was pruned or refused or failed.
        retry_of: The trial whose parameters it tries again.
    """

    number: int
    outcome: str
    values: dict[str, float]
    params: dict[str, Any]
    seconds: float | None
    reason: str | None
    retry_of: int | None


def open_study(options: StudyOptions, space: SearchSpace, first: Mapping[str, Any] | None = None) -> Study:
    """Open a study, or begin it; trials whose worker is gone are dropped, to be tried again.

    Args:
        first: Values that a new study tries first; None, or not in the space: none.

    Raises:
        ConfigError: A study of that name is there, and of another search space, other objectives or settings.
        CheckpointError, SaveError: As `open_storage`.
    """
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    storage = open_storage(options.storage)
    identity = {
        "space": space.to_dict(),
        "objectives": dict(options.directions),
        "settings": dict(options.settings),
    }
    with reporting_storage(options.storage):
        names = {summary.study_name for summary in optuna.get_all_study_summaries(storage, include_best_trial=False)}
        is_new = options.name not in names
        if not is_new:
            _require_alike(optuna.load_study(study_name=options.name, storage=storage), options, identity)
        study = optuna.create_study(
            storage=storage,
            study_name=options.name,
            directions=[StudyDirection[each.upper()] for each in options.directions.values()],
            load_if_exists=True,
            pruner=PRUNERS[options.pruner](options),
        )
        if is_new:
            study.set_user_attr(_IDENTITY, identity)
            if first is not None and (stored := space.stored(first)) is not None:
                study.enqueue_trial(stored, skip_if_exists=True)
        retire_abandoned(study)
    return study


def _require_alike(study: Study, options: StudyOptions, identity: Mapping[str, Any]) -> None:
    where = f"{options.name} in {options.storage}"
    former = study.user_attrs.get(_IDENTITY)
    directions = [StudyDirection[each.upper()] for each in options.directions.values()]
    if former is None and (study.trials or study.directions != directions):
        raise ConfigError(f"{where} is a study of another program", hint="name another study_name, or another storage")
    for part, words in (("objectives", "other objectives"), ("space", "another search space")):
        if former is not None and former[part] != identity[part]:
            raise ConfigError(
                f"{where} is a study of {words}",
                found=identity[part],
                allowed=str(former[part]),
                hint="name another study_name, or another output_dir, for a study of its own",
            )
    was, now = (former or identity)["settings"], identity["settings"]
    changed = sorted(key for key in was.keys() | now.keys() if was.get(key) != now.get(key))
    if changed:
        raise ConfigError(
            f"{where} is a study of another configuration: its trials cannot be compared",
            found=", ".join(f"{key}: {now.get(key)}" for key in changed),
            allowed=", ".join(f"{key}: {was.get(key)}" for key in changed),
            hint="name another study_name, or another output_dir, for a study of its own",
        )


def run_trials(
    study: Study,
    options: StudyOptions,
    space: SearchSpace,
    objective: Objective,
    after: Callable[[TrialRecord], None] = lambda record: None,
) -> None:
    """Run trials until the study has enough of them.

    Args:
        objective: What is minimized or maximized.
        after: Is given each trial that this worker ended.

    Raises:
        ConfigError: The objective gives no such figure.
        FourfoldError: Of the objective; its trial is marked as failed, and its parameters wait to be tried again.
        KeyboardInterrupt: Likewise.
    """
    with reporting_storage(options.storage):
        while _num_taken(study) < options.n_trials:
            _run_trial(study, options, space, objective, after)
            retire_abandoned(study)


def _num_taken(study: Study) -> int:
    """Trials that ended, and those that someone runs."""
    done = (TrialState.COMPLETE, TrialState.PRUNED)
    return sum(trial.state in done or is_alive(trial) for trial in study.get_trials(deepcopy=False))


def _run_trial(
    study: Study,
    options: StudyOptions,
    space: SearchSpace,
    objective: Objective,
    after: Callable[[TrialRecord], None],
) -> None:
    began = time.monotonic()
    # Of one seed, each worker and each start would draw the same anew: so each trial has its own.
    study.sampler = SAMPLERS[options.sampler](options, _seed(options, len(study.get_trials(deepcopy=False))))
    trial = study.ask()
    study.sampler = SAMPLERS[options.sampler](options, _seed(options, trial.number))
    prunes = len(options.directions) == 1 and options.pruner != "none"
    try:
        with beating(trial):
            values = space.suggest(trial)
            figures = objective(Handle(trial.number, trial, prunes), values)
            numbers = [_figure(figures, name) for name in options.directions]
            odd = [name for name, number in zip(options.directions, numbers, strict=True) if not math.isfinite(number)]
            if odd:
                raise Pruned(f"{', '.join(odd)} is not finite")
            trial.set_user_attr("figures", {k: v for k, v in figures.items() if isinstance(v, (int, float))})
        study.tell(trial, numbers)
    except (Refused, Pruned) as end:
        trial.set_user_attr(OUTCOME, "refused" if isinstance(end, Refused) else "pruned")
        trial.set_user_attr(REASON, str(end))
        study.tell(trial, state=TrialState.PRUNED)
    except UpdateFinishedTrialError:
        # It was taken for dead, as after a long sleep of the machine, and is another worker's now.
        return
    except BaseException as error:
        words = str(error).splitlines()
        drop(study, trial, f"{type(error).__name__}: {words[0] if words else ''}", again=True)
        raise
    frozen = next(each for each in study.get_trials(deepcopy=False) if each.number == trial.number)
    after(_record(frozen, space, list(options.directions), time.monotonic() - began))


def _seed(options: StudyOptions, number: int) -> int:
    return (options.seed * 1_000_003 + number) % 2**32


def _figure(figures: Mapping[str, Any], name: str) -> float:
    value = figures.get(name)
    if value is None or isinstance(value, bool) or not isinstance(value, (int, float)):
        known = sorted(key for key, each in figures.items() if isinstance(each, (int, float)))
        raise ConfigError(f"search: objectives: a run gives no figure {name}", found=value, allowed=known)
    return float(value)


def _record(trial: FrozenTrial, space: SearchSpace, objectives: list[str], seconds: float | None = None) -> TrialRecord:
    outcomes = {TrialState.COMPLETE: "finished", TrialState.FAIL: "failed", TrialState.WAITING: "waiting"}
    outcome = outcomes.get(trial.state) or ("running" if trial.state == TrialState.RUNNING else "pruned")
    if trial.duration is not None and seconds is None:
        seconds = trial.duration.total_seconds()
    is_finished = trial.state == TrialState.COMPLETE
    return TrialRecord(
        trial.number,
        trial.user_attrs.get(OUTCOME, outcome),
        dict(zip(objectives, trial.values, strict=True)) if is_finished else {},
        space.values(trial.params),
        seconds,
        trial.user_attrs.get(REASON) or ("its worker is gone" if trial.state == TrialState.FAIL else None),
        trial.user_attrs.get(RETRY_OF),
    )


def records(study: Study, options: StudyOptions, space: SearchSpace) -> list[TrialRecord]:
    """All trials of a study, by number."""
    return [_record(trial, space, list(options.directions)) for trial in study.get_trials(deepcopy=False)]


def best_trials(study: Study) -> list[int]:
    """Numbers of the trials that none beats: the best, of several objectives the Pareto front; none: empty."""
    finished = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not finished:
        return []
    if len(study.directions) == 1:
        return [study.best_trial.number]
    return sorted(trial.number for trial in study.best_trials)
