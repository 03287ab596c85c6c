"""What has been hung on a module beside its own computation."""

from __future__ import annotations

from torch import nn

__all__ = ["HOOKS", "hooks_of"]

# Where a module keeps them, by when they run.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def hooks_of(module: nn.Module) -> frozenset[tuple[str, int]]:
    """Each by when it runs and by its number, which no other has had."""
    return frozenset((kind, number) for kind in HOOKS for number in getattr(module, kind))
