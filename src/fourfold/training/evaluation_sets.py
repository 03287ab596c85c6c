"""Sets of held-out rows by their names, and what their figures are called in logs.

One set that needs no name has "", and its figures are eval_loss, ...; those of a set NAME are eval_NAME_loss, ...
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TypeAlias

from datasets import Dataset

__all__ = ["EvalDataset", "as_the_trainer_takes_them", "by_name", "loss_names", "prefix_of"]

EvalDataset: TypeAlias = Dataset | Mapping[str, Dataset] | None
"""As the Trainer takes held-out rows: one set, or several by name."""

_LOSS = re.compile(r"eval_(?:(.+)_)?loss")
# A part of ORPO's loss, and that of no set.
_PART = "_nll_loss"


def by_name(given: EvalDataset) -> dict[str, Dataset]:
    """The sets by name."""
    if given is None:
        return {}
    return dict(given) if isinstance(given, Mapping) else {"": given}


def as_the_trainer_takes_them(sets: Mapping[str, Dataset]) -> EvalDataset:
    """The inverse of `by_name`."""
    if not sets:
        return None
    return sets[""] if "" in sets else dict(sets)


def prefix_of(name: str) -> str:
    """What the figures of a set begin with, before an underscore."""
    return f"eval_{name}" if name else "eval"


def loss_names(log: Mapping[str, object]) -> dict[str, str]:
    """Key of each evaluation loss in a log to the name of its set."""
    losses = [key for key, value in log.items() if value is not None and not key.endswith(_PART)]
    return {key: found[1] or "" for key in losses if (found := _LOSS.fullmatch(key))}
