"""From a YAML file and command-line overrides to a RunConfig, or to one ConfigError with every fault.

file ──────> entries (key, value, where) ──┐
                                           ├─ aliases resolved in each ── overrides win ──> RunConfig
overrides ─> entries (key, value, where) ──┘
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fourfold.config.aliases import ALIASES, UNSUPPORTED, is_switched_off
from fourfold.config.reference import allowed_values, is_text
from fourfold.config.run import EXCLUSIVE_KEYS, RunConfig, contradictions
from fourfold.errors import ConfigError

__all__ = ["SEARCH_SECTION", "load_config", "read_mapping"]

# Of a run's file, what is no key of the run: see `fourfold.config.search`.
SEARCH_SECTION = "search"


@dataclass(frozen=True)
class _Entry:
    """One key as it was given. `key` is the name used there until an alias is resolved to ours."""

    key: str
    value: Any
    where: str
    given_as: str

    @property
    def said(self) -> str:
        """The entry's place in an error message: `run.yaml:3  sequence_len (max_length)`."""
        ours = "" if self.given_as == self.key else f" ({self.key})"
        return f"{self.where}  {self.given_as}{ours}"


@dataclass(frozen=True)
class _Fault:
    what: str
    found: str | None = None
    allowed: str | None = None
    hint: str | None = None

    def __str__(self) -> str:
        return str(ConfigError(self.what, found=self.found, allowed=self.allowed, hint=self.hint))


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run's configuration.

    Args:
        path: YAML file, or the folder of a run (its config.yaml is read, and output_dir is that folder: a run that was
            moved is where it is now); None: overrides alone.
        overrides: Command-line words: `--key value`, `--key=value`, `--flag`, `--no-flag`. Values are YAML.
            An override wins over the file, and displaces the other key of a pair in EXCLUSIVE_KEYS.

    Raises:
        ConfigError: Everything that is wrong, as one numbered list with file and line.
    """
    faults: list[_Fault] = []
    source = "the configuration" if path is None else str(path)
    file_entries = _read_file(Path(path), faults) if path is not None else []
    if file_entries is None:
        # Nothing is known of the file's keys: what else there is to say would be noise.
        raise ConfigError(_numbered(faults, source))
    in_file = _resolve_aliases(file_entries, faults)
    if path is not None and Path(path).is_dir():
        in_file["output_dir"] = _entry("output_dir", str(path), source)
    on_command_line = _resolve_aliases(_read_overrides(overrides, faults), faults)
    for pair in EXCLUSIVE_KEYS:
        for key, other in (pair, pair[::-1]):
            if key in on_command_line and on_command_line[key].value and other not in on_command_line:
                in_file.pop(other, None)
    config = _validate(in_file | on_command_line, source, faults)
    if config is None or faults:
        raise ConfigError(_numbered(faults, source))
    return config


def _numbered(faults: Sequence[_Fault], source: str) -> str:
    title = f"1 fault in {source}" if len(faults) == 1 else f"{len(faults)} faults in {source}"
    items = [f"{number}. {fault}".replace("\n", "\n   ") for number, fault in enumerate(faults, start=1)]
    return "\n\n".join([title, *items])


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as PyYAML reads it, but 2e-4 is a number, as in YAML 1.2 and everywhere else."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_mapping(path: Path) -> dict[str, Any]:
    """All of a YAML file, of which `load_config` reads the keys of the run.

    Raises:
        ConfigError: There is no such file, or it is no mapping of keys that are there once.
    """
    faults: list[_Fault] = []
    entries = _read_file(path, faults, sections=True)
    if faults or entries is None:
        raise ConfigError(_numbered(faults, str(path)))
    return {entry.key: entry.value for entry in entries}


def _read_file(path: Path, faults: list[_Fault], *, sections: bool = False) -> list[_Entry] | None:
    """The file's keys in order, each once, with the sections that are no keys or without; None: none to be had."""
    if path.is_dir():
        path = path / "config.yaml"
    if not path.is_file():
        faults.append(_Fault(f"{path} does not exist", hint="give a YAML file, or the folder of a run"))
        return None
    try:
        text = path.read_text(encoding="utf-8-sig")
        loader = _Loader(text)
        root = loader.get_single_node()
        if root is None:
            return []
        if not isinstance(root, yaml.MappingNode):
            faults.append(_Fault(f"{path} is no mapping", allowed="lines of `key: value`"))
            return None
        _refuse_duplicates(root, str(path), faults, visited=set())
        return [
            _entry(str(key.value), loader.construct_object(value, deep=True), f"{path}:{_line(key)}")
            for key, value in _first_of_each_key(root)
            if sections or key.value != SEARCH_SECTION
        ]
    except OSError as error:
        faults.append(_Fault(f"{path} cannot be read", found=error.strerror))
    except UnicodeDecodeError as error:
        faults.append(_Fault(f"{path} is not UTF-8 text", found=f"byte {error.object[error.start]:#04x}"))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        faults.append(_Fault(f"{where}  not valid YAML", found=error.problem))
    except yaml.reader.ReaderError as error:
        faults.append(_Fault(f"{path}  not valid YAML", found=error.reason))
    return None


def _first_of_each_key(node: yaml.MappingNode) -> list[tuple[yaml.Node, yaml.Node]]:
    first: dict[str, tuple[yaml.Node, yaml.Node]] = {}
    for key, value in node.value:
        first.setdefault(str(key.value), (key, value))
    return list(first.values())


def _line(node: yaml.Node) -> int:
    return int(node.start_mark.line) + 1


def _refuse_duplicates(node: yaml.Node, path: str, faults: list[_Fault], visited: set[int]) -> None:
    """PyYAML keeps the last of two equal keys and says nothing."""
    if id(node) in visited:  # an anchor may be referred to many times, even from inside itself
        return
    visited.add(id(node))
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _refuse_duplicates(item, path, faults, visited)
    if not isinstance(node, yaml.MappingNode):
        return
    first_lines: dict[str, int] = {}
    for key, value in node.value:
        name = str(key.value)
        if name in first_lines:
            faults.append(
                _Fault(
                    f"{path}:{_line(key)}  {name} is given twice",
                    found=f"the first on line {first_lines[name]}",
                    hint="leave one of them out",
                )
            )
        first_lines.setdefault(name, _line(key))
        _refuse_duplicates(value, path, faults, visited)


def _entry(key: str, value: Any, where: str) -> _Entry:
    return _Entry(key=key, value=value, where=where, given_as=key)


_COMMAND_LINE = "command line"
_OPTION = re.compile(r"--[A-Za-z]")


def _read_overrides(words: Sequence[str], faults: list[_Fault]) -> list[_Entry]:
    entries: list[_Entry] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not _OPTION.match(word):
            what = f"{_COMMAND_LINE}  {word} belongs to no key"
            faults.append(_Fault(what, allowed="--key value or --key=value"))
            continue
        name, has_value, text = word[2:].partition("=")
        key = name.replace("-", "_")
        positive = key.removeprefix("no_")
        if positive != key and positive in RunConfig.model_fields.keys() | ALIASES.keys():
            entries.append(_entry(positive, False, _COMMAND_LINE))
        elif has_value:
            entries.append(_entry(key, _parse_override(key, text, faults), _COMMAND_LINE))
        elif rest and not _OPTION.match(rest[0]):
            entries.append(_entry(key, _parse_override(key, rest.pop(0), faults), _COMMAND_LINE))
        else:
            entries.append(_entry(key, True, _COMMAND_LINE))
    return entries


def _parse_override(key: str, text: str, faults: list[_Fault]) -> Any:
    try:
        # Not unsafe: _Loader is a SafeLoader.
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError:
        value = text
        if not (key in RunConfig.model_fields and is_text(key)):
            faults.append(
                _Fault(f"{_COMMAND_LINE}  {key} is not valid YAML", found=text, hint="put the value in quotes")
            )
    if key in RunConfig.model_fields and is_text(key) and value is not None:
        return text
    return value


def _resolve_aliases(entries: Iterable[_Entry], faults: list[_Fault]) -> dict[str, _Entry]:
    """Entries by our keys; a fault for an unknown key, and for one key given two values."""
    resolved: dict[str, _Entry] = {}
    for given in entries:
        for entry in _in_our_keys(given, faults):
            earlier = resolved.setdefault(entry.key, entry)
            if (type(earlier.value), earlier.value) != (type(entry.value), entry.value):
                faults.append(
                    _Fault(
                        f"{entry.said} and {earlier.said} are one key with two values",
                        found=f"{_shown(entry.value)} and {_shown(earlier.value)}",
                        hint="leave one of them out",
                    )
                )
    return resolved


def _in_our_keys(given: _Entry, faults: list[_Fault]) -> list[_Entry]:
    if given.key in ALIASES:
        if given.value is None and given.key not in RunConfig.model_fields:
            return []
        try:
            ours = ALIASES[given.key](given.value)
        except ValueError as error:
            faults.append(_Fault(given.said, found=_shown(given.value), hint=str(error)))
            return []
        return [replace(given, key=key, value=value) for key, value in ours.items()]
    if given.key in RunConfig.model_fields:
        return [given]
    if given.key in UNSUPPORTED:
        if not is_switched_off(given.value):
            faults.append(
                _Fault(
                    f"{given.where}  {given.key} is known, and not supported",
                    found=_shown(given.value),
                    hint=UNSUPPORTED[given.key],
                )
            )
        return []
    nearest = difflib.get_close_matches(
        given.key.removeprefix("no_"), [*RunConfig.model_fields, *ALIASES], n=1, cutoff=0.6
    )
    hint = f"did you mean {nearest[0]}?" if nearest else "`python -m fourfold.config` lists all keys"
    faults.append(_Fault(f"{given.where}  {given.key} is no key", hint=hint))
    return []


_KINDS = {str: "text", bool: "a truth value", int: "a whole number", float: "a number", list: "a list"}


def _shown(value: object) -> str:
    """A value and its type: `"16" (text)`, as quotes are what is wrong there more often than not."""
    if value is None:
        return "null"
    if isinstance(value, dict):
        return f"{value} (a mapping)"
    if isinstance(value, bool):
        return str(value).lower()
    text = f'"{value}"' if isinstance(value, str) else str(value)
    return f"{text} ({_KINDS.get(type(value), type(value).__name__)})"


def _validate(entries: dict[str, _Entry], source: str, faults: list[_Fault]) -> RunConfig | None:
    values = {key: entry.value for key, entry in entries.items()}
    try:
        return RunConfig(**values)
    except ValidationError as error:
        # One fault a key: a union reports each of its branches. An empty location is a contradiction, found
        # again below, and a default factory is not called once anything is wrong.
        faulty = {
            str(problem["loc"][0])
            for problem in error.errors()
            if problem["loc"] and problem["type"] != "default_factory_not_called"
        }
    for key in (key for key in RunConfig.model_fields if key in faulty):
        if key in entries:
            entry = entries[key]
            faults.append(_Fault(entry.said, found=_shown(entry.value), allowed=allowed_values(key)))
        else:
            faults.append(_Fault(f"{source}  {key} is missing", hint=str(RunConfig.model_fields[key].description)))
    # The faulty keys stand at their defaults here, so that contradictions among the others are found as well.
    sound = {key: value for key, value in values.items() if key not in faulty}
    partial = RunConfig.model_construct(**{"model_name_or_path": ""} | sound)
    for contradiction in contradictions(partial):
        if faulty.isdisjoint(contradiction.keys):
            where = [entries[key].said for key in contradiction.keys if key in entries]
            faults.append(_Fault(contradiction.what, found=", ".join(where), hint=contradiction.hint))
    return None
