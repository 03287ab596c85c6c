"""The section `search:` of a configuration: what `fourfold tune` searches over, for what, and where it is kept."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fourfold.config.loading import SEARCH_SECTION, read_mapping
from fourfold.config.reference import allowed_values
from fourfold.config.run import EXCLUSIVE_KEYS, RunConfig
from fourfold.config.types import Count, CountOrZero
from fourfold.errors import ConfigError
from fourfold.search.space import Choices, Range, SearchSpace

__all__ = ["SearchConfig", "load_search", "search_space", "with_values"]

Direction = Literal["minimize", "maximize"]
# These are the trial's own.
_NOT_SEARCHED = ("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "distributed", "report_to", "project")
# Of figures whose direction is not given, those with one of these in their name are the better the higher they are.
_THE_HIGHER = ("acc", "exact_match", "margin", "reward", "per_second", "rouge", "bleu", "chrf", "f1")
_RANGE_KEYS = ("low", "high", "log", "step")


class SearchConfig(BaseModel):
    """The choices of a search. Frozen; an unknown key or a wrong type is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    space: dict[str, Any] = Field(
        min_length=1, description="For each key of a configuration {low, high, log, step}, or a list of choices."
    )
    objectives: Annotated[list[str], Field(min_length=1)] | Annotated[dict[str, Direction], Field(min_length=1)] = (
        Field(
            ["eval_loss"],
            description="Figures of a run; with minimize or maximize, where that is not told by the name.",
        )
    )
    n_trials: Count = Field(20, description="Finished trials of the whole study, pruned and refused ones included.")
    storage: str | None = Field(
        None, min_length=1, description="A file, or a URL (sqlite:///..., postgresql://...); null: in output_dir."
    )
    study_name: str | None = Field(None, min_length=1, description="Name in the storage; null: that of output_dir.")
    sampler: Literal["tpe", "nsgaii", "random"] = Field("tpe", description="What draws the next configuration.")
    pruner: Literal["median", "hyperband", "none"] = Field(
        "median", description="What ends a hopeless trial early, where there is one objective."
    )
    seed: CountOrZero = Field(0, description="Seed of the sampler.")

    @property
    def directions(self) -> dict[str, str]:
        """minimize or maximize, by objective."""
        if isinstance(self.objectives, dict):
            return dict(self.objectives)
        return {
            name: "maximize" if any(part in name for part in _THE_HIGHER) else "minimize" for name in self.objectives
        }


def load_search(config: str | Path, file: str | Path | None = None, **given: Any) -> SearchConfig:
    """Read what to search.

    Args:
        config: YAML file of the run, with a section `search:`.
        file: A file in its place: the section's keys, or such a section.
        given: Keys that win over the file's; None: not given.

    Raises:
        ConfigError: No such section or file, or what is wrong with it.
    """
    source = Path(config if file is None else file)
    found = read_mapping(source)
    section = found.get(SEARCH_SECTION, None if file is None else found)
    if section is None:
        raise ConfigError(
            f"{source} does not say what to search",
            allowed="a section `search:` with `space:`, or --search FILE",
            hint="for example search: {space: {learning_rate: {low: 1e-5, high: 1e-2, log: true}}}",
        )
    if not isinstance(section, Mapping):
        raise ConfigError(f"{source}  {SEARCH_SECTION} is no mapping", found=section, allowed=SearchConfig.model_fields)
    values = {**section, **{key: value for key, value in given.items() if value is not None}}
    try:
        return SearchConfig(**values)
    except ValidationError as error:
        fault = error.errors()[0]
        key = str(fault["loc"][0]) if fault["loc"] else SEARCH_SECTION
        if fault["type"] == "extra_forbidden":
            raise ConfigError(
                f"{source}  {SEARCH_SECTION}: {key} is no key of a search",
                allowed=SearchConfig.model_fields,
                hint=_nearest(key, SearchConfig.model_fields),
            ) from error
        raise ConfigError(
            f"{source}  {SEARCH_SECTION}: {key}",
            found=None if fault["type"] == "missing" else values.get(key),
            allowed=SearchConfig.model_fields[key].description,
        ) from error


def search_space(search: SearchConfig) -> SearchSpace:
    """The space, each entry of which is checked against what its key takes.

    Raises:
        ConfigError: A key that there is not, or a value that the key does not take.
    """
    return SearchSpace({key: _entry(key, entry) for key, entry in search.space.items()})


def with_values(config: RunConfig, values: Mapping[str, Any], **more: Any) -> RunConfig:
    """The run with these values; as on the command line, a key displaces the other of a pair in EXCLUSIVE_KEYS.

    Raises:
        ConfigError: They contradict one another, or other keys of the run.
    """
    given = {key: getattr(config, key) for key in config.model_fields_set}
    for pair in EXCLUSIVE_KEYS:
        for key, other in (pair, pair[::-1]):
            if values.get(key) and other not in values:
                given.pop(other, None)
    try:
        return RunConfig(**(given | dict(values) | more))
    except ValidationError as error:
        raise ConfigError("; ".join(dict.fromkeys(str(fault["msg"]) for fault in error.errors()))) from error


def _entry(key: str, entry: object) -> Range | Choices:
    where = f"{SEARCH_SECTION}.space: {key}"
    if key not in RunConfig.model_fields:
        raise ConfigError(f"{where} is no key of a configuration", hint=_nearest(key, RunConfig.model_fields))
    if key in _NOT_SEARCHED:
        raise ConfigError(f"{where} is each trial's own, and not searched over")
    try:
        if isinstance(entry, Mapping) and set(entry) == {"choices"}:
            entry = entry["choices"]
        if isinstance(entry, list):
            for value in entry:
                _require_allowed(where, key, value)
            return Choices(tuple(entry))
        if not isinstance(entry, Mapping) or not {"low", "high"} <= set(entry) <= set(_RANGE_KEYS):
            raise ConfigError(where, found=entry, allowed="{low, high, log, step}, or a list of choices")
        return _range(where, key, entry)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}", found=entry) from error


def _range(where: str, key: str, entry: Mapping[str, Any]) -> Range:
    log, step = entry.get("log", False), entry.get("step")
    if not isinstance(log, bool):
        raise ConfigError(f"{where}: log", found=log, allowed="true or false")
    for name in ("low", "high", "step"):
        value = entry.get(name)
        if isinstance(value, bool) or not isinstance(
            value, (int, float) if name != "step" else (int, float, type(None))
        ):
            raise ConfigError(f"{where}: {name}", found=value, allowed="a number; for other values, a list of choices")
    low, high = entry["low"], entry["high"]
    for value in (low, high):
        _require_allowed(where, key, value)
    is_int = not _is_allowed(key, low + 0.5)
    made = Range(low, high, log, step, is_int)
    if is_int and low + (step or 1) < high:
        # Such as 33, where the key knows 32, 64 and 128.
        _require_allowed(where, key, low + (step or 1))
    return made


def _is_allowed(key: str, value: object) -> bool:
    try:
        RunConfig.model_validate({"model_name_or_path": "MODEL"} | {key: value})
    except ValidationError as error:
        return not any(fault["loc"] and fault["loc"][0] == key for fault in error.errors())
    return True


def _require_allowed(where: str, key: str, value: object) -> None:
    if not _is_allowed(key, value):
        raise ConfigError(where, found=value, allowed=allowed_values(key))


def _nearest(key: str, known: Mapping[str, Any]) -> str | None:
    nearest = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    return f"did you mean {nearest[0]}?" if nearest else None
