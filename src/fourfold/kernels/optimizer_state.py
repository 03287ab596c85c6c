"""What a step of an optimizer works on: parameters, their moments in flat memory, and where each part lies.

Moments of one kind (bits, placement) lie in one flat buffer for each: resident ones on the parameters' device, paged
ones in the host's pinned memory, from which `fourfold.kernels.paging` brings them page by page.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fourfold.kernels.host_memory import HostBuffer
from fourfold.kernels.paging import PAGE_BYTES, Page, Pager, host_buffer

__all__ = [
    "BLOCK_SIZE",
    "CHUNK_SIZE",
    "MOMENTS",
    "SMALLEST_ABSMAX",
    "Entry",
    "Hyperparameters",
    "Kind",
    "Maps",
    "Moments",
    "OptimizerState",
    "Pack",
    "lay_out",
    "moment_bytes",
    "order",
]

BLOCK_SIZE = 256
"""Elements that share a scale of the 8-bit state."""

CHUNK_SIZE = 2048
"""Elements that one program of a kernel works on."""

# Below it the reciprocal of a block's scale is not finite; such a block is zero.
SMALLEST_ABSMAX = 1.2e-38

MOMENTS: dict[str, tuple[str, ...]] = {"adamw": ("exp_avg", "exp_avg_sq"), "lion": ("exp_avg",)}
"""Update rule -> its moments, by torch's names: the first is signed, the second is not."""


class Hyperparameters(NamedTuple):
    """Those of one group of parameters. Lion has no eps."""

    lr: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float


class Maps(NamedTuple):
    """The code points of the two moments, fp32 [256], sorted."""

    first: Tensor
    second: Tensor


class Entry(NamedTuple):
    """A parameter (contiguous; fp32, bf16 or fp16), its group, and the kind of its state."""

    param: Tensor
    group: int
    bits: int
    paged: bool = False


class Kind(NamedTuple):
    """A kind of state: 8 or 32 bits, in the host's memory or on the parameters' device."""

    bits: int
    paged: bool


class Moments(NamedTuple):
    """Flat memory of one kind of state.

    Attributes:
        values: One for each moment of the rule; fp32, or uint8 where it has 8 bits.
        absmax: Scales of 8-bit moments, fp32, one for BLOCK_SIZE elements; empty for 32 bits.
    """

    values: tuple[Tensor, ...]
    absmax: tuple[Tensor, ...]


class Pack(NamedTuple):
    """Parameters that one launch updates: of one dtype, with one kind of state; next to each other in the lists.

    `pages` are those that its moments come in: none where they are resident.
    """

    dtype: torch.dtype
    kind: Kind
    first_chunk: int
    num_chunks: int
    pages: tuple[Page, ...]


@dataclass(frozen=True, eq=False)
class OptimizerState:
    """The state of all parameters, in one buffer for each kind.

    Attributes:
        rule: A key of MOMENTS.
        params: The parameters, pack by pack. Contiguous.
        group_of: Group of each parameter.
        kinds: Kind of each parameter's state.
        offsets: Where each parameter's moments begin in the buffers of its kind; whole blocks.
        packs: See `Pack`.
        moments: The buffers of each kind.
        host: What those of paged kinds are parts of, one for each kind; pinned as long as this is there.
        pager: Brings pages to the device and back; None where nothing is paged.
        steps: Updates made of each parameter, fp32 [num_params].
        maps, thresholds: Code points, and the middles between them, ascending, then -inf, fp32 [256].
        norm: Norm of all gradients of the last step before clipping, fp32 scalar.
        scale: What the last step's gradients were multiplied by, fp32 scalar; -1 where the step changed nothing.
        chunk_tensor, chunk_index: Which parameter a chunk belongs to, and which of its chunks it is, int32.
        chunk_offset: Where its moments begin, in its page or, where they are resident, in its buffer; int64.
        table: int64 [num_params, 2]: number of elements, group.
    """

    rule: str
    params: list[Tensor]
    group_of: list[int]
    kinds: list[Kind]
    offsets: list[int]
    packs: list[Pack]
    moments: dict[Kind, Moments]
    host: dict[Kind, HostBuffer]
    pager: Pager | None
    steps: Tensor
    maps: Maps
    thresholds: Maps
    norm: Tensor
    scale: Tensor
    chunk_tensor: Tensor
    chunk_index: Tensor
    chunk_offset: Tensor
    table: Tensor

    def views(self, index: int) -> dict[str, Tensor]:
        """The state of one parameter, as views, by the names of torch (32-bit) and bitsandbytes (8-bit).

        Those of a paged one are in the host's memory: `settle` before reading or writing them.
        """
        param, start, kind = self.params[index], self.offsets[index], self.kinds[index]
        elements = slice(start, start + param.numel())
        blocks = slice(start // BLOCK_SIZE, start // BLOCK_SIZE + _num_blocks(param.numel()))
        values, absmax = self.moments[kind]
        names = MOMENTS[self.rule] if kind.bits == 32 else [f"state{number + 1}" for number in range(len(values))]
        views = {"step": self.steps[index]}
        views |= {f"absmax{number + 1}": scales[blocks] for number, scales in enumerate(absmax)}
        return views | {name: flat[elements].view(param.shape) for name, flat in zip(names, values, strict=True)}

    def settle(self) -> None:
        """Wait until every page that was updated is back in the host's memory."""
        if self.pager is not None:
            self.pager.settle()


def _num_blocks(numel: int) -> int:
    return -(-numel // BLOCK_SIZE)


def moment_bytes(rule: str, bits: int, numel: int) -> int:
    """Bytes of the moments and scales of `numel` elements of one parameter: whole blocks."""
    block = 4 * BLOCK_SIZE if bits == 32 else BLOCK_SIZE + 4
    return len(MOMENTS[rule]) * block * _num_blocks(numel)


def order(entry: Entry) -> tuple[str, int]:
    """Parameters are sorted by it, wherever their state lives: the norm is summed up in one order."""
    return str(entry.param.dtype), entry.bits


def lay_out(entries: Sequence[Entry], maps: Maps, rule: str = "adamw", page_bytes: int = PAGE_BYTES) -> OptimizerState:
    """The state of parameters before their first step.

    Args:
        entries: All of them on one device.
        maps: Code points of the 8-bit state, on that device.
        rule: A key of MOMENTS.
        page_bytes: Moments and scales that a page holds, at most, but at least those of CHUNK_SIZE elements.

    Raises:
        TrainingError: Pinned memory is refused.
    """
    ordered = sorted(entries, key=order)
    device = ordered[0].param.device
    kinds = [Kind(entry.bits, entry.paged) for entry in ordered]
    ends = dict.fromkeys(kinds, 0)
    offsets = list[int]()
    chunk_tensor, chunk_index, chunk_begin = list[int](), list[int](), list[int]()
    bounds = list[tuple[torch.dtype, Kind, int, int]]()  # a pack's chunks: the first, and the one after the last
    for index, (entry, kind) in enumerate(zip(ordered, kinds, strict=True)):
        offsets.append(ends[kind])
        ends[kind] += _num_blocks(entry.param.numel()) * BLOCK_SIZE
        chunks = range(-(-entry.param.numel() // CHUNK_SIZE))
        first = len(chunk_tensor)
        if bounds and bounds[-1][:2] == (entry.param.dtype, kind):
            first = bounds.pop()[2]
        chunk_tensor += [index] * len(chunks)
        chunk_index += chunks
        chunk_begin += range(offsets[-1], offsets[-1] + len(chunks) * CHUNK_SIZE, CHUNK_SIZE)
        bounds.append((entry.param.dtype, kind, first, len(chunk_tensor)))

    # Before such memory is let go, what copies to and from it is waited for: on the device that was the current one.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        host = {
            kind: host_buffer(moment_bytes(rule, kind.bits, end), device) for kind, end in ends.items() if kind.paged
        }
    moments = {kind: _allocate(rule, kind, end, device, host.get(kind)) for kind, end in ends.items()}
    packs = list[Pack]()
    for dtype, kind, first, last in bounds:
        pages = list[Page]()
        if kind.paged:
            # A pack's moments end where those of its last parameter do.
            index = chunk_tensor[last - 1]
            end = offsets[index] + _num_blocks(ordered[index].param.numel()) * BLOCK_SIZE
            many = max(1, page_bytes // moment_bytes(rule, kind.bits, CHUNK_SIZE))
            starts = range(first, last, many)
            begins = [chunk_begin[start] for start in starts]
            for start, begin, stop in zip(starts, begins, [*begins[1:], end], strict=True):
                count = min(many, last - start)
                pages.append(Page(start, count, _slices(moments[kind], begin, stop)))
                chunk_begin[start : start + count] = [at - begin for at in chunk_begin[start : start + count]]
        packs.append(Pack(dtype, kind, first, last - first, tuple(pages)))
    paged = [page for pack in packs for page in pack.pages]

    padding = torch.full((1,), -math.inf, device=device)
    rows = [(entry.param.numel(), entry.group) for entry in ordered]
    return OptimizerState(
        rule=rule,
        params=[entry.param for entry in ordered],
        group_of=[entry.group for entry in ordered],
        kinds=kinds,
        offsets=offsets,
        packs=packs,
        moments=moments,
        host=host,
        pager=Pager(paged, device) if paged else None,
        steps=torch.zeros(len(ordered), device=device),
        maps=maps,
        thresholds=Maps(*(torch.cat([(points[1:] + points[:-1]) / 2, padding]) for points in maps)),
        norm=torch.zeros((), device=device),
        scale=torch.ones((), device=device),
        chunk_tensor=torch.tensor(chunk_tensor, dtype=torch.int32, device=device),
        chunk_index=torch.tensor(chunk_index, dtype=torch.int32, device=device),
        chunk_offset=torch.tensor(chunk_begin, dtype=torch.int64, device=device),
        table=torch.tensor(rows, dtype=torch.int64, device=device),
    )


def _allocate(rule: str, kind: Kind, numel: int, device: torch.device, host: HostBuffer | None) -> Moments:
    """Zeros: where state lives is decided here alone."""
    many = len(MOMENTS[rule])
    parts = [(numel, torch.float32)] * many
    if kind.bits == 8:
        parts = [(numel, torch.uint8)] * many + [(numel // BLOCK_SIZE, torch.float32)] * many
    if host is None:
        tensors = [torch.zeros(count, dtype=dtype, device=device) for count, dtype in parts]
    else:
        pieces = host.data.split([count * dtype.itemsize for count, dtype in parts])
        tensors = [piece.view(dtype) for piece, (_, dtype) in zip(pieces, parts, strict=True)]
    return Moments(tuple(tensors[:many]), tuple(tensors[many:]))


def _slices(moments: Moments, begin: int, end: int) -> tuple[Tensor, ...]:
    """Elements from `begin` to `end`, whole blocks: values, then scales."""
    blocks = slice(begin // BLOCK_SIZE, end // BLOCK_SIZE)
    return (*(flat[begin:end] for flat in moments.values), *(flat[blocks] for flat in moments.absmax))
