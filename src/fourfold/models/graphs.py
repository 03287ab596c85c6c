"""CUDA graphs of fused blocks: where batches are short, the host cannot launch kernels as fast as the GPU runs them.

Once a model has been given the same shape a few times in succession, the forward and the backward pass of each block
are captured as one graph each, and from then on replayed: two launches instead of about ninety. A graph works in memory
of its own that never moves. Hence:

- All graphs of a model share one memory pool, and are captured in the order of the layers, each layer's forward pass
  and then its backward pass. Memory that one of them leaves free is then written by another only before a layer's saved
  tensors are made or after they were used, as long as all forward passes come before all backward passes.
- A forward pass while another one waits for its backward pass runs without graphs, as does any other shape, packed
  rows, and a policy that moves tensors to the host.
- What a graph was captured with is its key: another adapter, policy or scaling, moved weights are another key. Layers
  may have different policies.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import weakref
from collections.abc import Hashable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fourfold.kernels.low_rank import new_extended, with_room
from fourfold.models.block_backward import block_backward
from fourfold.models.block_forward import block_forward
from fourfold.models.block_state import Block, Saved
from fourfold.models.recomputation import USED_UP

__all__ = ["AUTO_TOKENS", "BlockGraphs"]

logger = logging.getLogger(__name__)

# Up to here a block's kernels are short enough for the host to fall behind, and the pool's working memory is small.
AUTO_TOKENS = 8192
# Two passes without graphs compile the kernels and make the plans of the libraries, which a capture must not do.
_PASSES_BEFORE_CAPTURE = 3


class _Pending:
    """Alive from a graph's forward to its backward pass."""


@dataclass
class _Shared:
    """Memory that all graphs of one shape use in turn."""

    grad_x: Tensor  # the gradient that goes into a block's backward pass, and comes out of it; with room
    cos: Tensor | None = None
    sin: Tensor | None = None
    rotation: weakref.ref[Tensor] | None = None

    def placed(self, block: Block) -> Block:
        """The block with its positions in this memory; a block without rotation has none."""
        if block.cos is None or block.sin is None:
            return block
        if self.cos is None or self.sin is None:
            self.cos, self.sin = block.cos.clone(), block.sin.clone()
        return replace(block, cos=self.cos, sin=self.sin)

    def rotate_by(self, block: Block) -> None:
        """Take over the positions of this forward pass; all its layers have the same."""
        if block.cos is None or block.sin is None or self.cos is None or self.sin is None:
            return
        if self.rotation is None or self.rotation() is not block.rotation:
            self.cos.copy_(block.cos)
            self.sin.copy_(block.sin)
            self.rotation = None if block.rotation is None else weakref.ref(block.rotation)


@dataclass
class _Graph:
    """One block's two graphs and the memory they work in."""

    shared: _Shared
    x: Tensor
    out: Tensor
    sums: list[Tensor]  # fp32, the gradients of all adapters, each flat
    shapes: list[torch.Size | None]
    held: list[Tensor]
    forward: torch.cuda.CUDAGraph
    backward: torch.cuda.CUDAGraph
    needs_x: bool
    pending: weakref.ref[_Pending] | None = None

    def is_pending(self) -> bool:
        return self.pending is not None and self.pending() is not None

    def gradients(self) -> list[Tensor | None]:
        """Of the parameters, in memory of their own: the next pass writes over `sums`."""
        if not self.sums:
            return [None] * len(self.shapes)
        sizes = [0 if shape is None else shape.numel() for shape in self.shapes]
        pieces = torch.cat(self.sums).split(sizes)
        return [None if shape is None else piece.view(shape) for shape, piece in zip(self.shapes, pieces, strict=True)]


class BlockGraphs:
    """The graphs of one model's fused blocks.

    Args:
        max_tokens: Tokens of a batch up to which graphs are used.
    """

    def __init__(self, max_tokens: int = AUTO_TOKENS) -> None:
        self.max_tokens = max_tokens
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None
        self._shape: Hashable = None
        self._count: dict[int, int] = {}
        self._shared: dict[Hashable, _Shared] = {}
        self._graphs: dict[tuple[int, Hashable], _Graph] = {}
        self._replays = 0
        self._others = 0

    def __deepcopy__(self, memo: dict[int, Any]) -> BlockGraphs:
        """A copied model has other memory: its graphs are captured anew."""
        return BlockGraphs(self.max_tokens)

    def run(self, index: int, x: Tensor, block: Block) -> Tensor | None:
        """The output of block number `index` of the model by its graph; None where it must run without.

        Args:
            index: The first layer's is 0.
            x: [tokens, hidden]. Gradients are wanted.
        """
        if not self._may_run(x, block):
            return None
        shape = (x.shape, x.dtype, x.device, block.batch)
        if shape != self._shape:
            if self._graphs:
                # A batch out of the ordinary, such as an epoch's last; if these are the ordinary ones, graphs go.
                self._others += 1
                if self._others > self._replays:
                    self.clear()
                return None
            self._shape = shape
            self._count.clear()
        self._count[index] = self._count.get(index, 0) + 1
        if self._count[index] < _PASSES_BEFORE_CAPTURE:
            return None
        waits = [other for (other, _), graph in self._graphs.items() if graph.is_pending()]
        if any(other >= index for other in waits):
            return None  # a second forward pass, before the first one's backward pass
        key = (index, (shape, x.requires_grad, block.policy, block.fingerprint()))
        graph = self._graphs.get(key)
        if graph is None:
            if any(other >= index for other, _ in self._graphs):
                # Captured now, it would be out of the layers' order: all are captured anew.
                self.clear()
                return None
            graph = self._captured(x, block)
            if graph is None:
                return None
            self._graphs[key] = graph
        self._replays += 1
        out: Tensor = _GraphedBlock.apply(x, graph, block, *block.parameters())
        return out

    def clear(self) -> None:
        """Drop all graphs and their memory; blocks run without until a shape has settled anew."""
        self._graphs.clear()
        self._shared.clear()
        self._count.clear()
        self._pool = self._shape = None
        self._replays = self._others = 0

    def _may_run(self, x: Tensor, block: Block) -> bool:
        return (
            x.is_cuda
            and len(x) <= self.max_tokens
            and not block.policy.offload
            and block.documents is None
            and not torch.cuda.is_current_stream_capturing()
        )

    def _captured(self, x: Tensor, block: Block) -> _Graph | None:
        """None, from now on, where there is no memory for it."""
        try:
            return self._capture(x, block)
        except torch.OutOfMemoryError:
            logger.warning("There is no memory for CUDA graphs: blocks run without them")
            self.clear()
            self.max_tokens = -1
            return None

    def _capture(self, x: Tensor, block: Block) -> _Graph:
        if self._stream is None:
            self._stream = torch.cuda.Stream(x.device)
        if self._pool is None:
            # The passes before have left all their memory in the allocator's cache, where the pool cannot take it.
            torch.cuda.empty_cache()
            self._pool = torch.cuda.graph_pool_handle()
        shared = self._shared.get(self._shape)
        if shared is None:
            shared = self._shared[self._shape] = _Shared(new_extended(x, len(x), x.shape[1], block.down.rank))
        static = shared.placed(block)
        # What a graph before this one put out stays where it is; anything else is copied to where it is looked for.
        is_static = any(graph.out.data_ptr() == x.data_ptr() for graph in self._graphs.values())
        input = x.detach() if is_static else x.detach().clone()
        needs_x = x.requires_grad
        forward, backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # A collection in the middle could free what must not be freed during a capture.
        collects = gc.isenabled()
        gc.disable()
        torch.cuda.synchronize(x.device)
        try:
            with torch.cuda.stream(self._stream):
                with self._capturing(forward):
                    out, saved = block_forward(input, static, block.policy.keeps)
                held = _tensors(saved)
                with self._capturing(backward):
                    grad_x = _with_room(shared.grad_x, input.shape[1], block.down.rank)
                    _, grads = block_backward(grad_x, saved, static, needs_x=needs_x, out=shared.grad_x)
                    sums = [grad.reshape(-1) for grad in grads if grad is not None]
        finally:
            if collects:
                gc.enable()
        torch.cuda.current_stream(x.device).wait_stream(self._stream)
        shapes = [None if grad is None else grad.shape for grad in grads]
        return _Graph(shared, input, out, sums, shapes, held, forward, backward, needs_x)

    @contextlib.contextmanager
    def _capturing(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        # Other threads, such as the one that pins batches, go on with their work.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            yield
        finally:
            graph.capture_end()


def _with_room(shared: Tensor, width: int, rank: int) -> Tensor:
    """The shared gradient with room for as many low-rank columns; in its memory but for a layer of higher rank."""
    if shared.shape[1] >= width + rank:
        return shared[:, : width + rank]
    return with_room(shared[:, :width], rank)


def _tensors(saved: Saved) -> list[Tensor]:
    """All that the backward graph reads: held, so that the pool gives their memory to no other graph."""
    tensors = [value for value in vars(saved).values() if isinstance(value, Tensor)]
    return tensors if saved.state is None else [*tensors, *saved.state.tensors()]


class _GraphedBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, graph: _Graph, block: Block, *parameters: Tensor) -> Tensor:
        graph.shared.rotate_by(block)
        if x.data_ptr() != graph.x.data_ptr():
            graph.x.copy_(x)
        graph.forward.replay()
        ctx.graph, ctx.pending = graph, _Pending()
        graph.pending = weakref.ref(ctx.pending)
        return graph.out.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        graph: _Graph = ctx.graph
        if ctx.pending is None:
            raise RuntimeError(USED_UP)
        shared = graph.shared.grad_x[:, : grad.shape[1]]
        if grad.data_ptr() != shared.data_ptr():
            shared.copy_(grad)
        graph.backward.replay()
        ctx.pending = graph.pending = None
        return shared.detach() if graph.needs_x else None, None, None, *graph.gradients()
