"""Which modules of a model a list of names and patterns means."""

from __future__ import annotations

from collections.abc import Iterable
from fnmatch import fnmatchcase

__all__ = ["matches", "unmatched"]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether the dotted module name is meant by one of `patterns`.

    A pattern with `*`, `?` or `[` is a glob over the whole name. Any other is a run of whole components:
    "lm_head", "self_attn" and "layers.0.mlp" all mean every module on or below such a path.
    """
    return any(_matches(name, pattern) for pattern in patterns)


def unmatched(names: Iterable[str], patterns: Iterable[str]) -> list[str]:
    """The patterns that mean none of `names`."""
    known = list(names)
    return [pattern for pattern in patterns if not any(_matches(name, pattern) for name in known)]


def _matches(name: str, pattern: str) -> bool:
    if any(character in pattern for character in "*?["):
        return fnmatchcase(name, pattern)
    return f".{pattern}." in f".{name}."
