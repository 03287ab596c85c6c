"""Decode passes as CUDA graphs: a pass of hundreds of launches becomes one.

A graph is captured for a number of rows, an adapter, and a cache as it stands. Numbers of rows come in buckets; a pass
with fewer repeats its first row, which writes the same numbers to the same place. Graphs of one adapter share the
memory of what none of them needs any more.
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

__all__ = ["BUCKETS", "GraphedStep"]

# Rows that passes are captured for.
BUCKETS = (1, 2, 4, 8, 16, 32, 64)


class _Cache(Protocol):
    version: int


class _Step(Protocol):
    def prefill(self, slot: int, input_ids: Tensor, cache: Any, adapter: str | None, start: int = 0) -> Tensor: ...

    def decode(self, tokens: Tensor, slots: Tensor, positions: Tensor, cache: Any, adapter: str | None) -> Tensor: ...


@dataclass(frozen=True)
class _Graph:
    """A captured pass: its inputs [3, rows] (tokens, slots, positions), and the logits that a replay leaves."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    logits: Tensor


class GraphedStep:
    """A step whose decode passes are replayed as CUDA graphs on a GPU; elsewhere, and for all else, the step itself.

    The logits that `decode` gives are good until the next pass.

    Args:
        step: Its decode pass must read nothing back, and allocate by its inputs' shapes alone.
        buckets: Rows that passes are captured for, in rising order; a pass with more is not captured.
    """

    def __init__(self, step: _Step, buckets: tuple[int, ...] = BUCKETS) -> None:
        self.step = step
        self.buckets = buckets
        self._graphs: dict[tuple[int, str | None], _Graph] = {}
        self._held_for: tuple[int, int, int] | None = None
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def __getattr__(self, name: str) -> Any:
        # What else a step has: its shape, its adapters.
        if name == "step":
            raise AttributeError(name)
        return getattr(self.step, name)

    def prefill(self, slot: int, input_ids: Tensor, cache: Any, adapter: str | None, start: int = 0) -> Tensor:
        """The step's own."""
        return self.step.prefill(slot, input_ids, cache, adapter, start)

    @torch.no_grad()
    def decode(self, tokens: Tensor, slots: Tensor, positions: Tensor, cache: Any, adapter: str | None) -> Tensor:
        """What the step's `decode` gives, [n, vocab]."""
        rows = len(tokens)
        bucket = next((size for size in self.buckets if size >= rows), None)
        if not tokens.is_cuda or bucket is None:
            return self.step.decode(tokens, slots, positions, cache, adapter)
        self._drop_outdated(cache)
        graph = self._graphs.get((bucket, adapter))
        if graph is None:
            graph = self._graphs[bucket, adapter] = self._capture(bucket, tokens, slots, positions, cache, adapter)
        fill(graph.inputs, tokens, slots, positions)
        graph.graph.replay()
        return graph.logits[:rows]

    def warm_up(self, num_slots: int, cache: Any, adapter: str | None) -> None:
        """Capture the passes of up to `num_slots` rows now, before anyone waits for them. What is in the first
        position of slots is written over."""
        device = next(keys for keys in cache.keys if keys is not None).device
        for size in (size for size in self.buckets if size <= num_slots):
            slots = torch.arange(size, device=device)
            zeros = torch.zeros_like(slots)
            self.decode(zeros, slots, zeros, cache, adapter)

    def clear(self) -> None:
        """Free all graphs."""
        self._graphs.clear()
        self._pool = self._held_for = None

    def _drop_outdated(self, cache: Any) -> None:
        # A cache that has grown is other memory, adapters that were read anew are as well.
        now = (id(cache), cache.version, getattr(self.step, "version", 0))
        if self._held_for != now:
            self.clear()
            self._held_for = now

    def _capture(
        self, bucket: int, tokens: Tensor, slots: Tensor, positions: Tensor, cache: Any, adapter: str | None
    ) -> _Graph:
        inputs = torch.empty(3, bucket, dtype=torch.int64, device=tokens.device)
        fill(inputs, tokens, slots, positions)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        if self._stream is None:
            self._stream = torch.cuda.Stream(tokens.device)
        self._stream.wait_stream(torch.cuda.current_stream(tokens.device))
        graph = torch.cuda.CUDAGraph()
        # A collection in the middle could free what must not be freed during a capture.
        collects = gc.isenabled()
        with torch.cuda.stream(self._stream):
            # Once before: kernels are compiled, libraries made ready.
            self._pass(inputs, cache, adapter)
            torch.cuda.synchronize(tokens.device)
            gc.disable()
            try:
                # Other threads, such as a server's, go on with their work.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                try:
                    logits = self._pass(inputs, cache, adapter)
                finally:
                    graph.capture_end()
            finally:
                if collects:
                    gc.enable()
        torch.cuda.current_stream(tokens.device).wait_stream(self._stream)
        return _Graph(graph, inputs, logits)

    def _pass(self, inputs: Tensor, cache: Any, adapter: str | None) -> Tensor:
        tokens, slots, positions = inputs
        return self.step.decode(tokens, slots, positions, cache, adapter)


def fill(inputs: Tensor, tokens: Tensor, slots: Tensor, positions: Tensor) -> None:
    """Write a pass's rows to `inputs` [3, bucket], the first one again in what is left over."""
    rows = len(tokens)
    for held, given in zip(inputs, (tokens, slots, positions), strict=True):
        held[:rows] = given
        held[rows:] = given[:1]
