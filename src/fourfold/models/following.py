"""Which memory a computation holds, moment by moment, and what it moves: followed tensor by tensor as it runs.

On the meta device nothing is computed and nothing takes memory, and yet every operator makes its outputs' storages and
PyTorch lets go of them as it does on a GPU. So what a pass holds is found by running it, in milliseconds, whatever the
layer is. What an operator works in beside its outputs is not seen.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["GRADIENTS", "INPUT", "Followed", "Pass", "follow"]

# Names of tensors that formulas look for.
INPUT, GRADIENTS = "x", "gradients"

# What makes memory and writes none of it.
_UNWRITTEN = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")
_SCALAR_BYTES = 8
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_grouped_mm", "_int_mm")


@dataclass(frozen=True)
class Pass:
    """A forward or a backward pass.

    Args:
        events: What was allocated, and, below 0, let go, in order: bytes, and what it is.
        before: What there was when it began, by name.
        moved_bytes: What operators beside products read and wrote.
        operations: Of products in 16 bits, floating-point operations.
        wide_operations: Of those in fp32.
        launches: Operators that compute anything.
    """

    events: tuple[tuple[int, str], ...]
    before: dict[str, int]
    moved_bytes: int
    operations: int
    wide_operations: int
    launches: int

    @cached_property
    def peak(self) -> dict[str, int]:
        """All that is there at the highest moment, by name."""
        heights = itertools.accumulate((size for size, _ in self.events), initial=0)
        last = max(enumerate(heights), key=lambda height: height[1])[0]
        return _summed(self.before, self.events[:last])

    @property
    def after(self) -> dict[str, int]:
        """What there is at its end, by name."""
        return _summed(self.before, self.events)


def _summed(before: dict[str, int], events: Iterable[tuple[int, str]]) -> dict[str, int]:
    found = dict(before)
    for size, name in events:
        found[name] = found.get(name, 0) + size
    return {name: size for name, size in found.items() if size}


@dataclass(frozen=True)
class Followed:
    """What `follow` saw."""

    forward: Pass
    backward: Pass


class _Follower(TorchDispatchMode):
    """Sees every operator that runs, and every storage that is made and let go."""

    def __init__(self) -> None:
        super().__init__()
        self.where = ""
        # What is made is called so, if anything, instead of by where and how it is made.
        self.name: str | None = None
        self.events: list[tuple[int, str]] = []
        self.moved_bytes = self.operations = self.wide_operations = self.launches = 0
        # By id, which is a storage's as long as it lives.
        self._known: dict[int, tuple[Any, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = list(_tensors(args))
        written = list(_tensors((out,)))
        name = func.overloadpacket.__name__
        own = {id(tensor.untyped_storage()) for tensor in read}
        for tensor in written:
            storage = tensor.untyped_storage()
            is_new = id(storage) not in self._known and id(storage) not in own
            if is_new and storage.nbytes() > _SCALAR_BYTES:
                self._made(storage, self.name or f"{self.where}, {name}")
        if func.is_view or name in _UNWRITTEN:
            return out
        self.launches += 1
        if name in _PRODUCTS:
            right = [tensor for tensor in read if tensor.is_floating_point() or tensor.dtype == torch.int8][-1]
            operations = 2 * written[0].numel() * right.shape[-2]
            if written[0].dim() > right.dim():
                # Each group of a grouped product sums over rows of its own.
                operations //= written[0].shape[0]
            if written[0].dtype == torch.float32:
                self.wide_operations += operations
            else:
                self.operations += operations
        else:
            self.moved_bytes += sum(tensor.nbytes for tensor in (*read, *written))
        return out

    def _made(self, storage: torch.UntypedStorage, name: str) -> None:
        size, key = storage.nbytes(), id(storage)

        def let_go(_: Any) -> None:
            del self._known[key]
            self.events.append((-size, name))

        self._known[key] = weakref.ref(storage, let_go), len(self.events)
        self.events.append((size, name))

    def rename(self, tensor: Tensor, name: str) -> None:
        """Call a tensor that is still there, and was made since the last `take`, by another name."""
        known = self._known.get(id(tensor.untyped_storage()))
        if known is not None:
            self.events[known[1]] = (self.events[known[1]][0], name)

    def take(self, before: dict[str, int]) -> Pass:
        """What happened since the last call."""
        counts = (self.moved_bytes, self.operations, self.wide_operations, self.launches)
        made = Pass(tuple(self.events), before, *counts)
        self.events, self.moved_bytes, self.operations, self.wide_operations, self.launches = [], 0, 0, 0, 0
        return made


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


class _Input(torch.autograd.Function):
    """A tensor that another layer would have made: it is let go when nothing needs it any more."""

    @staticmethod
    def forward(ctx: Any, like: Tensor) -> Tensor:
        return torch.empty_like(like)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> None:
        return None


class _Output(torch.autograd.Function):
    """Takes a layer's output and keeps nothing of it; gives its gradient, as the next layer would."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, follower: _Follower) -> Tensor:
        ctx.shape, ctx.dtype, ctx.follower = output.shape, output.dtype, follower
        return output.new_empty(())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        ctx.follower.name = "gradient of the output"
        made = grad.new_empty(ctx.shape, dtype=ctx.dtype)
        ctx.follower.name = None
        return made, None


def follow(module: nn.Module, run: Callable[[Tensor], Tensor], like: Tensor) -> Followed:
    """Follow `run` forward and backward.

    Args:
        module: What `run` runs, whose modules give tensors their names.
        run: From a tensor to another.
        like: A tensor like its input.

    The input, `INPUT`, is there as long as the layer before it would leave it to this one. Gradients of parameters are
    `GRADIENTS` from when they are made.
    """
    follower = _Follower()
    handles = []
    for name, child in module.named_modules():
        if not any(child.children()):
            handles += _named(follower, child, name)
    collects = gc.isenabled()
    # What is let go late, when the collector happens to run, would be so on another day.
    gc.disable()
    try:
        with follower:
            follower.name = INPUT
            hidden: list[Tensor] = [_Input.apply(like.requires_grad_())]
            follower.name, follower.where = None, "layer"
            loss = _Output.apply(run(hidden.pop()), follower)
            forward = follower.take({})
            follower.where = "backward"
            loss.backward()
            for parameter in module.parameters():
                if parameter.grad is not None:
                    follower.rename(parameter.grad, GRADIENTS)
            backward = follower.take(forward.after)
    finally:
        module.zero_grad(set_to_none=True)
        for handle in handles:
            handle.remove()
        if collects:
            gc.enable()
    return Followed(forward, backward)


def _named(follower: _Follower, child: nn.Module, name: str) -> list[Any]:
    """Hooks by which what `child` makes has its name."""
    outer: list[str] = []

    def enter(*_: Any) -> None:
        outer.append(follower.where)
        follower.where = name

    def leave(*_: Any) -> None:
        follower.where = outer.pop()

    return [child.register_forward_pre_hook(enter), child.register_forward_hook(leave, always_call=True)]
