"""Passes as CUDA graphs: a pass of hundreds of launches becomes one.

A graph is captured for a number of rows, an adapter, and a cache as it stands. Numbers of rows come in buckets; a pass
with fewer repeats its first row, which writes the same numbers to the same place. Graphs share the memory of what none
of them needs any more.

Prompts are captured as well, from their first token on: for lengths in buckets, whose rest is filled with the last
token again. What that writes stands behind the prompt, where its answer is written before it is read. A length is
captured when it comes for the second time, since capturing takes about as long as two passes.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fourfold.kernels.launching import next_power_of_2

__all__ = ["BUCKETS", "GraphedStep", "prompt_bucket"]

logger = logging.getLogger(__name__)

# Rows that passes are captured for.
BUCKETS = (1, 2, 4, 8, 16, 32, 64)
# Tokens of prompts that are captured: the host keeps up with the GPU where there are more.
MOST_PROMPT_TOKENS = 2048
# Graphs of prompts that are kept; the one that was not used for longest goes, and its length is new again. All lengths
# of an adapter are 24.
MOST_PROMPT_GRAPHS = 48
# Tokens by which lengths of prompts differ at least: with fewer, reading the weights takes longer than the tokens.
_PROMPT_STEP = 64


class _Cache(Protocol):
    version: int


class _Step(Protocol):
    def prefill(self, slot: int, input_ids: Tensor, cache: Any, adapter: str | None, start: int = 0) -> Tensor: ...

    def decode(self, tokens: Tensor, slots: Tensor, positions: Tensor, cache: Any, adapter: str | None) -> Tensor: ...


@dataclass(frozen=True)
class _Graph:
    """A captured pass: its inputs, as `fill` or `fill_prompt` writes them, and the logits that a replay leaves."""

    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    logits: Tensor


class GraphedStep:
    """A step whose passes are replayed as CUDA graphs on a GPU; elsewhere, and for all else, the step itself.

    The logits that `decode` gives are good until the next pass.

    Args:
        step: Its decode pass must read nothing back, and allocate by its inputs' shapes alone. Prompts are captured
            where it has what `FusedStep` has for that: `prefill_padded`, `prompt_bytes` and `dtype`.
        buckets: Rows that passes are captured for, in rising order; a pass with more is not captured.
    """

    def __init__(self, step: _Step, buckets: tuple[int, ...] = BUCKETS) -> None:
        self.step = step
        self.buckets = buckets
        self.captures_prompts = hasattr(step, "prefill_padded")
        self._graphs: dict[tuple[int, str | None], _Graph] = {}
        self._prompts: dict[tuple[int, str | None], _Graph] = {}
        self._seen: set[tuple[int, str | None]] = set()
        self._held_for: tuple[int, int, int] | None = None
        self._pools: dict[str, Any] = {}
        self._stream: torch.cuda.Stream | None = None

    def __getattr__(self, name: str) -> Any:
        # What else a step has: its shape, its adapters.
        if name == "step":
            raise AttributeError(name)
        return getattr(self.step, name)

    @torch.no_grad()
    def prefill(self, slot: int, input_ids: Tensor, cache: Any, adapter: str | None, start: int = 0) -> Tensor:
        """What the step's `prefill` gives, [vocab]."""
        graph = None
        if start == 0 and self.captures_prompts and self._serves(input_ids) and len(input_ids) <= MOST_PROMPT_TOKENS:
            graph = self._graph_of_prompt(slot, input_ids, cache, adapter)
        if graph is None:
            return self.step.prefill(slot, input_ids, cache, adapter, start)
        fill_prompt(graph.inputs, input_ids, slot)
        graph.graph.replay()
        return graph.logits.clone()

    @torch.no_grad()
    def decode(self, tokens: Tensor, slots: Tensor, positions: Tensor, cache: Any, adapter: str | None) -> Tensor:
        """What the step's `decode` gives, [n, vocab]."""
        rows = len(tokens)
        bucket = next((size for size in self.buckets if size >= rows), None)
        if not self._serves(tokens) or bucket is None:
            return self.step.decode(tokens, slots, positions, cache, adapter)
        self._drop_outdated(cache)
        graph = self._graphs.get((bucket, adapter))
        if graph is None:
            inputs = torch.empty(3, bucket, dtype=torch.int64, device=tokens.device)
            fill(inputs, tokens, slots, positions)

            def run() -> Tensor:
                return self.step.decode(inputs[0], inputs[1], inputs[2], cache, adapter)

            graph = self._graphs[bucket, adapter] = self._capture("rows", inputs, run)
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
        """Free all graphs, once none of them runs."""
        held = next(iter((*self._graphs.values(), *self._prompts.values())), None)
        if held is not None and held.inputs.is_cuda:
            torch.cuda.synchronize(held.inputs.device)
        self._graphs.clear()
        self._prompts.clear()
        self._pools.clear()
        self._held_for = None

    def captured_bytes(self, length: int) -> int:
        """What graphs of prompts keep at most, where slots have `length` tokens."""
        if not self.captures_prompts:
            return 0
        step: Any = self.step
        working: int = step.prompt_bytes(min(MOST_PROMPT_TOKENS, length))
        logits: int = step.vocab_size * step.dtype.itemsize
        return working + MOST_PROMPT_GRAPHS * (logits + MOST_PROMPT_TOKENS * torch.int64.itemsize)

    @staticmethod
    def _serves(tokens: Tensor) -> bool:
        return tokens.is_cuda

    def _graph_of_prompt(self, slot: int, input_ids: Tensor, cache: Any, adapter: str | None) -> _Graph | None:
        """The graph for a prompt; None where its length is new, or cannot be captured."""
        room = min(keys.shape[2] for keys in cache.keys if keys is not None)
        key = (min(prompt_bucket(len(input_ids)), room), adapter)
        if key not in self._seen:
            self._seen.add(key)
            return None
        self._drop_outdated(cache)
        graph = self._prompts.pop(key, None)
        if graph is None:
            try:
                graph = self._capture_prompt(key[0], slot, input_ids, cache, adapter, room)
            except RuntimeError as error:
                # What is wrong with the pass itself shows without a graph.
                logger.warning("Prompts are not captured as CUDA graphs, which is slower: %s", error)
                self.captures_prompts = False
                self._prompts.clear()
                self._pools.pop("prompts", None)
                return None
            if len(self._prompts) >= MOST_PROMPT_GRAPHS:
                dropped = next(iter(self._prompts))
                del self._prompts[dropped]
                self._seen.remove(dropped)
        # The one that was used last stands last.
        self._prompts[key] = graph
        return graph

    def _capture_prompt(
        self, length: int, slot: int, input_ids: Tensor, cache: Any, adapter: str | None, room: int
    ) -> _Graph:
        step: Any = self.step
        inputs = torch.empty(length + 2, dtype=torch.int64, device=input_ids.device)
        fill_prompt(inputs, input_ids, slot)
        # In memory of their own: a pool that holds nothing between two passes is of use to any other as a whole.
        logits = torch.empty(step.vocab_size, dtype=step.dtype, device=input_ids.device)

        def run() -> Tensor:
            return logits.copy_(step.prefill_padded(inputs[:-2], inputs[-2:-1], inputs[-1:], cache, adapter))

        return self._capture("prompts", inputs, run, step.prompt_bytes(min(MOST_PROMPT_TOKENS, room)))

    def _drop_outdated(self, cache: Any) -> None:
        # A cache that has grown is other memory, adapters that were read anew are as well.
        now = (id(cache), cache.version, getattr(self.step, "version", 0))
        if self._held_for != now:
            self.clear()
            self._held_for = now

    def _capture(self, pool: str, inputs: Tensor, run: Callable[[], Tensor], reserved_bytes: int = 0) -> _Graph:
        """Capture what `run` does with `inputs`. Its memory comes from a pool, which is given so much at once that
        passes of any length find room: freed and asked for in another order, memory would come in pieces."""
        device = inputs.device
        if pool not in self._pools:
            self._pools[pool] = torch.cuda.graph_pool_handle()
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        graph = torch.cuda.CUDAGraph()
        # A collection in the middle could free what must not be freed during a capture.
        collects = gc.isenabled()
        with torch.cuda.stream(self._stream):
            # Once before: kernels are compiled, libraries made ready.
            run()
            torch.cuda.synchronize(device)
            # What passes have left to the allocator a capture cannot take, nor any pass on another stream.
            torch.cuda.empty_cache()
            gc.disable()
            try:
                # Other threads, such as a server's, go on with their work.
                graph.capture_begin(pool=self._pools[pool], capture_error_mode="thread_local")
                try:
                    if reserved_bytes:
                        torch.empty(reserved_bytes, dtype=torch.uint8, device=device)
                    logits = run()
                finally:
                    graph.capture_end()
            finally:
                if collects:
                    gc.enable()
        torch.cuda.current_stream(device).wait_stream(self._stream)
        return _Graph(graph, inputs, logits)


def prompt_bucket(length: int) -> int:
    """Tokens that a prompt is filled up to: up to an eighth more, or up to the next multiple of 64."""
    step = max(_PROMPT_STEP, next_power_of_2(length) // 16)
    return -(-length // step) * step


def fill_prompt(inputs: Tensor, input_ids: Tensor, slot: int) -> None:
    """Write a prompt to `inputs` [bucket + 2]: its tokens, the last one again in what is left over, its slot, and the
    index of its last token."""
    length = len(input_ids)
    inputs[:length] = input_ids
    inputs[length:-2] = input_ids[-1:]
    # Numbers that a kernel is given: nothing is copied from the host, which would wait.
    inputs[-2:-1].fill_(slot)
    inputs[-1:].fill_(length - 1)


def fill(inputs: Tensor, tokens: Tensor, slots: Tensor, positions: Tensor) -> None:
    """Write a pass's rows to `inputs` [3, bucket], the first one again in what is left over."""
    rows = len(tokens)
    for held, given in zip(inputs, (tokens, slots, positions), strict=True):
        held[:rows] = given
        held[rows:] = given[:1]
