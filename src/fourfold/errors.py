"""One tree of errors. Each message says what is wrong, what was found, what is allowed and what to do.

FourfoldError
├── ConfigError          a key, a value or a combination of keys in the run's configuration
├── QuantizationError    a tensor or an option that cannot be quantized
├── CheckpointError      a model or checkpoint on disk that is missing, cut short, or of a kind we refuse
├── AdapterError         LoRA targets or initialisation that do not fit the model
├── DataError            rows, templates and tokenizers
├── TrainingError        a run that cannot go on
├── InferenceError       a request that cannot be answered, or a model that the engine cannot run
├── SaveError            a folder that could not be written
└── VerificationError    what was exported is not what was trained
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "AdapterError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "FourfoldError",
    "InferenceError",
    "QuantizationError",
    "SaveError",
    "TrainingError",
    "VerificationError",
]


class FourfoldError(Exception):
    """An error a person can act on.

    Args:
        what: What is wrong, naming the file, row, key, tensor or module.
        found: What stood there.
        allowed: What may stand there, as text or as the list of names.
        hint: What to do about it.

    Attributes:
        exit_code: What a command that ends by this error leaves with.
        is_told: Whether another process of the run tells it.
    """

    exit_code = 1
    is_told = False

    def __init__(
        self,
        what: str,
        *,
        found: object = None,
        allowed: str | Iterable[object] | None = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.found = found
        self.allowed = allowed
        self.hint = hint
        super().__init__(self._message())

    def _message(self) -> str:
        lines = [self.what]
        if self.found is not None:
            lines.append(f"  found:   {self.found}")
        if self.allowed is not None:
            allowed = self.allowed if isinstance(self.allowed, str) else ", ".join(map(str, self.allowed))
            lines.append(f"  allowed: {allowed}")
        if self.hint is not None:
            lines.append(f"  to do:   {self.hint}")
        return "\n".join(lines)


class ConfigError(FourfoldError):
    """A key, a value or a combination of keys in the run's configuration."""

    exit_code = 2


class QuantizationError(FourfoldError):
    """A tensor or an option that cannot be quantized."""


class CheckpointError(FourfoldError):
    """A model or checkpoint on disk that is missing, cut short, or of a kind we refuse."""


class AdapterError(FourfoldError):
    """LoRA targets or initialisation that do not fit the model."""


class DataError(FourfoldError):
    """Rows, templates and tokenizers."""


class TrainingError(FourfoldError):
    """A run that cannot go on."""


class InferenceError(FourfoldError):
    """A request that cannot be answered, or a model that the engine cannot run."""


class SaveError(FourfoldError):
    """A folder that could not be written; what stood there before is untouched."""


class VerificationError(FourfoldError):
    """What was exported is not what was trained."""
