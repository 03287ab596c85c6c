"""What is searched over: for each key a range of numbers, or choices of any values."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optuna import Trial

__all__ = ["Choices", "Range", "SearchSpace"]


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both of them included.

    Args:
        low, high: The ends; whole numbers where `is_int`.
        log: Whether sizes, not differences, are drawn evenly.
        step: Distance between two values that may be drawn; None: any for numbers, 1 for whole ones.
        is_int: Whether values are whole numbers.

    Raises:
        ValueError: It holds nothing, or `log` and `step` do not go together.
    """

    low: float
    high: float
    log: bool = False
    step: float | None = None
    is_int: bool = False

    def __post_init__(self) -> None:
        if self.low > self.high:
            raise ValueError("low is above high")
        if self.log and self.low <= 0:
            raise ValueError("with log, low must be above 0")
        if self.log and self.step is not None:
            raise ValueError("log and step do not go together")
        if self.step is not None and self.step <= 0:
            raise ValueError("step must be above 0")
        if self.is_int and self.step is not None and self.step != int(self.step):
            raise ValueError("step must be a whole number where the key takes whole numbers")

    def suggest(self, trial: Trial, key: str) -> float:
        """A value, drawn by the trial's sampler."""
        if self.is_int:
            return trial.suggest_int(key, int(self.low), int(self.high), step=int(self.step or 1), log=self.log)
        return trial.suggest_float(key, float(self.low), float(self.high), step=self.step, log=self.log)

    def value(self, stored: Any) -> Any:
        """The key's value, of what the study stores of it."""
        return stored

    def stored(self, value: Any) -> Any:
        """What the study would store of a value. Raises ValueError where the range does not hold it."""
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not self.low <= value <= self.high:
            raise ValueError("not in the range")
        step = self.step or (1 if self.is_int and not self.log else None)
        if step is not None and abs((value - self.low) / step - round((value - self.low) / step)) > 1e-9:
            raise ValueError("between two steps of the range")
        return value

    def to_dict(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high, "log": self.log, "step": self.step}


@dataclass(frozen=True)
class Choices:
    """Some values. A study stores texts, numbers, truth values and null as they are, others as JSON.

    Raises:
        ValueError: There are none, or one is there twice.
    """

    values: tuple[Any, ...]
    _labels: tuple[Any, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        labels = tuple(each if _is_plain(each) else json.dumps(each, sort_keys=True) for each in self.values)
        if not labels:
            raise ValueError("there are no choices")
        # By type as well: to Python, true and 1 are equal.
        if len({(type(label), label) for label in labels}) < len(labels):
            raise ValueError("a choice is there twice")
        object.__setattr__(self, "_labels", labels)

    def suggest(self, trial: Trial, key: str) -> Any:
        """A value, drawn by the trial's sampler."""
        return self.value(trial.suggest_categorical(key, self._labels))

    def value(self, stored: Any) -> Any:
        """The key's value, of what the study stores of it."""
        return self.values[self._index(stored)]

    def stored(self, value: Any) -> Any:
        """What the study would store of a value. Raises ValueError where it is no choice."""
        return self._labels[self._index(value if _is_plain(value) else json.dumps(value, sort_keys=True))]

    def _index(self, label: Any) -> int:
        for index, each in enumerate(self._labels):
            if (type(each), each) == (type(label), label):
                return index
        raise ValueError("not among the choices")

    def to_dict(self) -> dict[str, Any]:
        return {"choices": list(self.values)}


def _is_plain(value: object) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


@dataclass(frozen=True)
class SearchSpace:
    """Keys, and what is drawn for each."""

    entries: Mapping[str, Range | Choices]

    def suggest(self, trial: Trial) -> dict[str, Any]:
        """A value for each key."""
        return {key: entry.suggest(trial, key) for key, entry in self.entries.items()}

    def values(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """The keys' values, of a trial's parameters as the study stores them."""
        return {key: self.entries[key].value(stored) for key, stored in params.items()}

    def stored(self, values: Mapping[str, Any]) -> dict[str, Any] | None:
        """What the study would store of these values; None where the space does not hold all of them."""
        try:
            return {key: entry.stored(values[key]) for key, entry in self.entries.items()}
        except ValueError:
            return None

    def to_dict(self) -> dict[str, Any]:
        """Plain data: equal for equal spaces."""
        return {key: entry.to_dict() for key, entry in self.entries.items()}
