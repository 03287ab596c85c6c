"""Keeps a verb within the memory that the configuration gives it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from fourfold.config import RunConfig
from fourfold.config import options as choices
from fourfold.memory.limit import memory_limit

__all__ = ["limit_of", "within_limit"]

P = ParamSpec("P")
R = TypeVar("R")


def limit_of(config: RunConfig) -> contextlib.AbstractContextManager[None]:
    """`memory_limit` as the configuration has it. Raises ConfigError for one that the GPU cannot have."""
    return memory_limit(choices.device(config), choices.memory_limit(config))


def within_limit(verb: Callable[P, R]) -> Callable[P, R]:
    """A function, first of a `config`, that takes no more of the GPU than its `gpu_memory_limit`."""

    @functools.wraps(verb)
    def limited(*args: P.args, **kwargs: P.kwargs) -> R:
        config = args[0] if args else kwargs["config"]
        assert isinstance(config, RunConfig)
        with limit_of(config):
            return verb(*args, **kwargs)

    return limited
