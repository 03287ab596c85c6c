"""What a decoder block keeps for its backward pass, what it computes again, and what waits in host memory.

A block's tensors, in bytes a token of Llama-3-8B in 16 bits, and what it takes to have them again:

    input      8 KiB     nothing: it must be kept
    qkv       12 KiB     a norm and the q, k, v projections
    attention  8 KiB     the attention itself (with its log-sum-exp)
    mid        8 KiB     the output projection (the residual stream between attention and MLP)
    gate_up   56 KiB     a norm and the gate and up projections

The output of `down_proj` is in no list: nothing in the backward pass needs it, so that it is never computed again.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fourfold.errors import ConfigError
from fourfold.kernels.host_memory import HostBuffer

__all__ = ["POLICIES", "USED_UP", "HostOffload", "Policy", "SavedTensors", "offloaded_bytes", "policies_of"]

# Of each tensor in a host buffer: a view of any dtype begins there, and copies do at their full speed.
_ALIGNMENT = 256


@dataclass(frozen=True)
class Policy:
    """What is kept from a block's forward to its backward pass.

    Args:
        keeps: Of "qkv", "attention", "mid" and "gate_up", those that are kept beside the input; the rest is computed
            again.
        offload: Whether what is kept waits in pinned host memory, copied by a stream of its own. "gate_up" never does:
            it is larger than all else together, and faster computed than copied.
    """

    keeps: frozenset[str]
    offload: bool = False


_SELECTIVE = frozenset({"attention", "mid"})
_ATTENTION = frozenset({"qkv", "attention", "mid"})

POLICIES: dict[str, Policy] = {
    # everything is kept
    "none": Policy(_ATTENTION | {"gate_up"}),
    # all of the attention half is kept; only gate and up are computed again
    "mlp": Policy(_ATTENTION),
    # what is dear is kept (the attention's output, the residual after it), what is cheap computed again
    "selective": Policy(_SELECTIVE),
    # only the input is kept: the whole block but down_proj is computed again
    "full": Policy(frozenset()),
    "mlp_offload": Policy(_ATTENTION, offload=True),
    "selective_offload": Policy(_SELECTIVE, offload=True),
    "full_offload": Policy(frozenset(), offload=True),
}


def policies_of(recompute: str | Sequence[str], num_layers: int) -> list[str]:
    """One policy a layer.

    Raises:
        ConfigError: A name that is not in `POLICIES`, or not as many as there are layers.
    """
    names = [recompute] * num_layers if isinstance(recompute, str) else list(recompute)
    if len(names) != num_layers:
        raise ConfigError(
            "recompute must name one policy for all layers, or one for each",
            found=f"{len(names)} names",
            allowed=f"1 or {num_layers}",
        )
    unknown = sorted({str(name) for name in names if name not in POLICIES})
    if unknown:
        raise ConfigError("unknown recomputation policy", found=unknown, allowed=list(POLICIES))
    return names


USED_UP = (
    "A fused block ran its backward pass twice, whose first run used up what the forward pass had saved; "
    "call the model again, or prepare it with fused=False for retain_graph=True"
)


def _nothing() -> None:
    return None


class SavedTensors:
    """Tensors on their way from a forward to its backward pass; `take` gives them once."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors: list[Tensor] | None = list(tensors)

    def take(self) -> list[Tensor]:
        """The tensors, which are forgotten here.

        Raises:
            RuntimeError: They were taken before: the backward pass works in their memory.
        """
        if self._tensors is None:
            raise RuntimeError(USED_UP)
        tensors, self._tensors = self._tensors, None
        return tensors


class _Offloaded(SavedTensors):
    def __init__(self, tensors: Sequence[Tensor], owner: HostOffload) -> None:
        super().__init__(tensors)
        self.owner = owner
        self.buffer: HostBuffer | None = None
        self.host: list[Tensor] = []  # the tensors in it
        self.copied: torch.cuda.Event | None = None  # to the host; later, back from it
        # Weak, so that a forward pass without a backward pass leaves nothing behind.
        self.previous: Callable[[], _Offloaded | None] = _nothing

    def take(self) -> list[Tensor]:
        if self.host:
            self.owner.bring(self)
        return super().take()


class HostOffload:
    """Keeps tensors in pinned host memory, in the order of the layers.

    A copy to the host runs beside the next layers' work; the device copy is let go once it is done, and never more than
    `_IN_FLIGHT` layers' copies are under way, so that memory does not grow where the bus is slower than the GPU. On the
    way back, the layer before is fetched while one is at work. Host buffers, one a layer, are kept for the next step,
    and give way to larger ones where its rows are longer. Off CUDA, tensors stay where they are.
    """

    _IN_FLIGHT = 2

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None
        self._free: list[HostBuffer] = []
        self._leaving: deque[_Offloaded] = deque()
        self._last: Callable[[], _Offloaded | None] = _nothing

    def __deepcopy__(self, memo: dict[int, Any]) -> HostOffload:
        """A copied model has copies of its own under way."""
        return HostOffload()

    def save(self, tensors: Sequence[Tensor]) -> SavedTensors:
        """Begin to move `tensors`, contiguous and all of one device, to the host."""
        saved = _Offloaded(tensors, self)
        if tensors[0].device.type != "cuda":
            return saved
        if self._stream is None or self._stream.device != tensors[0].device:
            self._stream = torch.cuda.Stream(tensors[0].device)
        while len(self._leaving) >= self._IN_FLIGHT:
            self._let_go(self._leaving.popleft())
        self._stream.wait_stream(torch.cuda.current_stream())
        saved.buffer = self._buffer(offloaded_bytes(tensor.nbytes for tensor in tensors))
        saved.host = _views(saved.buffer.data, tensors)
        with torch.cuda.stream(self._stream):
            for tensor, buffer in zip(tensors, saved.host, strict=True):
                buffer.copy_(tensor, non_blocking=True)
            saved.copied = self._stream.record_event()
        self._leaving.append(saved)
        saved.previous, self._last = self._last, weakref.ref(saved)
        return saved

    def bring(self, saved: _Offloaded) -> None:
        """Have the tensors of `saved` on the device, and begin with those of the layer before."""
        self._fetch(saved)
        assert saved.copied is not None
        torch.cuda.current_stream().wait_event(saved.copied)
        # The buffer is written again at the earliest by a copy that this stream's work is ahead of.
        assert saved.buffer is not None
        self._free.append(saved.buffer)
        saved.buffer, saved.host = None, []
        previous = saved.previous()
        if previous is not None and previous.host:
            self._fetch(previous)
        self._last = saved.previous

    def _fetch(self, saved: _Offloaded) -> None:
        """Begin to copy back, unless the device still has the tensors."""
        if saved._tensors is not None:
            return
        assert self._stream is not None
        # Allocated in the order of the current stream, so the memory may still be in use by what is queued there.
        device = self._stream.device
        tensors = [torch.empty(buffer.shape, dtype=buffer.dtype, device=device) for buffer in saved.host]
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for tensor, buffer in zip(tensors, saved.host, strict=True):
                tensor.copy_(buffer, non_blocking=True)
            saved.copied = self._stream.record_event()
        saved._tensors = tensors

    def _let_go(self, saved: _Offloaded) -> None:
        """Free the device's copy; what is queued from here on may use its memory."""
        if saved.host and saved._tensors is not None:
            assert saved.copied is not None
            torch.cuda.current_stream().wait_event(saved.copied)
            saved._tensors = None

    def _buffer(self, num_bytes: int) -> HostBuffer:
        """The smallest free one that is large enough; else a new one, in place of the largest that is too small."""
        self._free.sort(key=lambda buffer: buffer.data.nbytes)
        for index, buffer in enumerate(self._free):
            if buffer.data.nbytes >= num_bytes:
                return self._free.pop(index)
        if self._free:
            self._free.pop()
        told = {
            "purpose": "activations that wait for the backward pass",
            "otherwise": "take a recompute policy that does not offload",
        }
        return HostBuffer(num_bytes, pinned=True, **told)


def offloaded_bytes(sizes: Iterable[int]) -> int:
    """What tensors of these bytes take in a buffer of a layer."""
    return sum(-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes)


def _views(data: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """For each tensor its like in `data`, uint8."""
    views, start = [], 0
    for tensor in tensors:
        views.append(data[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
        start += offloaded_bytes([tensor.nbytes])
    return views
