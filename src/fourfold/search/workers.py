"""Which trials are still being run by someone, and what becomes of those that are not."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

from optuna import Study, Trial
from optuna.exceptions import OptunaError, UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

__all__ = ["RETRY_OF", "beating", "drop", "is_alive", "retire_abandoned"]

logger = logging.getLogger(__name__)

WORKER, BEAT, REASON, OUTCOME = "worker", "beat", "reason", "outcome"
RETRY_OF, RETRIES = "retry_of", "retries"
# A worker says that it is there every so often, and is taken for dead after so long without a word.
BEAT_SECONDS = 10.0
GRACE_SECONDS = 90.0
# A trial that takes its worker down each time is given up.
MOST_RETRIES = 3


@contextlib.contextmanager
def beating(trial: Trial) -> Iterator[None]:
    """While this lasts, the trial is marked as one that a worker runs."""
    trial.set_user_attr(WORKER, {"host": socket.gethostname(), "pid": os.getpid()})
    trial.set_user_attr(BEAT, time.time())
    is_over = threading.Event()

    def beat() -> None:
        while not is_over.wait(BEAT_SECONDS):
            try:
                trial.set_user_attr(BEAT, time.time())
            except Exception:
                # The storage may be there again for the next one.
                logger.debug("no beat of trial %d", trial.number, exc_info=True)

    thread = threading.Thread(target=beat, name="fourfold-beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def is_alive(trial: FrozenTrial, now: float | None = None) -> bool:
    """Whether a worker runs the trial: on this machine told by its process, on another by its last word."""
    if trial.state != TrialState.RUNNING:
        return False
    worker: dict[str, Any] = trial.user_attrs.get(WORKER, {})
    if worker.get("host") == socket.gethostname() and not _is_process(int(worker["pid"])):
        return False
    began = trial.datetime_start.timestamp() if trial.datetime_start else 0.0
    return float((now or time.time()) - trial.user_attrs.get(BEAT, began)) < GRACE_SECONDS


def _is_process(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def drop(study: Study, trial: FrozenTrial | Trial, reason: str, *, again: bool) -> None:
    """End a trial without a result, and have its parameters tried once more.

    Args:
        again: Whether to; never more than `MOST_RETRIES` times.
    """
    try:
        if isinstance(trial, Trial):
            trial.set_user_attr(REASON, reason)
        study.tell(trial.number, state=TrialState.FAIL)
    except (ValueError, UpdateFinishedTrialError):
        # Another worker was quicker.
        return
    retries = trial.user_attrs.get(RETRIES, 0)
    if again and trial.params and retries < MOST_RETRIES:
        study.enqueue_trial(trial.params, user_attrs={RETRY_OF: trial.number, RETRIES: retries + 1})


def retire_abandoned(study: Study) -> list[int]:
    """Drop the trials whose worker is gone, to be tried again; their numbers."""
    found = [trial for trial in study.get_trials(deepcopy=False) if trial.state == TrialState.RUNNING]
    gone = [trial for trial in found if not is_alive(trial)]
    for trial in gone:
        with contextlib.suppress(OptunaError):
            drop(study, trial, "its worker is gone", again=True)
    return [trial.number for trial in gone]
