"""Keeps a verb within the memory that the configuration gives it."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

from fourfold.config import RunConfig
from fourfold.config import options as choices
from fourfold.memory.limit import memory_limit

__all__ = ["limit_of", "within_limit"]

P = ParamSpec("P")
R = TypeVar("R")


def limit_of(config: RunConfig) -> contextlib.AbstractContextManager[None]:
    """`memory_limit` as the configuration has it. Raises ConfigError for one that the GPU cannot have."""
    return memory_limit(choices.device(config), choices.memory_limit(config))


def within_limit(verb: Callable[Concatenate[RunConfig, P], R]) -> Callable[Concatenate[RunConfig, P], R]:
    """A function of a configuration that takes no more of the GPU than its `gpu_memory_limit`."""

    @functools.wraps(verb)
    def limited(config: RunConfig, *args: P.args, **kwargs: P.kwargs) -> R:
        with limit_of(config):
            return verb(config, *args, **kwargs)

    return limited
