"""The bytes that an optimizer's state takes, from the shapes of its parameters alone."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from fourfold.kernels.adafactor import factor_shapes
from fourfold.kernels.optimizer_state import BLOCK_SIZE, CHUNK_SIZE, MOMENTS, moment_bytes
from fourfold.kernels.paging import NUM_SLOTS, PAGE_BYTES, slot_bytes
from fourfold.optimizers.moments import state_bits_of

__all__ = ["staging_bytes", "state_bytes", "working_bytes"]


def state_bytes(rule: str, state_bits: int, shapes: Iterable[Sequence[int]], min_8bit_size: int = 4096) -> int:
    """Bytes of moments and their scales, wherever they live: on the GPU, or in the host's memory where they are paged.

    AdamW keeps 8 bytes an element in 32 bits and 2 + 8/256 in 8 bits, Lion half of that, in whole blocks of 256;
    Adafactor 4 bytes for each row and each column.

    Args:
        rule: "adamw", "lion" or "adafactor", whose state_bits are 32.
        shapes: Those of the parameters that are trained.
        min_8bit_size: Parameters with fewer elements keep 32-bit state.
    """
    if rule == "adafactor":
        return sum(4 * factor.numel() for shape in shapes for factor in factor_shapes(shape).values())
    sizes = [math.prod(shape) for shape in shapes]
    return sum(moment_bytes(rule, state_bits_of(numel, state_bits, min_8bit_size), numel) for numel in sizes)


def staging_bytes(
    rule: str,
    state_bits: int,
    shapes: Iterable[Sequence[int]],
    page_bytes: int = PAGE_BYTES,
    min_8bit_size: int = 4096,
) -> int:
    """Bytes of the GPU through which paged state passes: three pages, at most.

    An upper bound, met where pages are full: of parameters with whole chunks of 2048 elements.
    """
    sizes = [math.prod(shape) for shape in shapes]
    num_pages, largest = 0, 0
    for bits in (8, 32):
        of_kind = [numel for numel in sizes if state_bits_of(numel, state_bits, min_8bit_size) == bits]
        num_chunks = sum(-(-numel // CHUNK_SIZE) for numel in of_kind)
        chunks = min(num_chunks, max(1, page_bytes // moment_bytes(rule, bits, CHUNK_SIZE)))
        if chunks:
            num_pages += -(-num_chunks // chunks)
            elements = chunks * CHUNK_SIZE
            parts = [elements * bits // 8] + ([elements // BLOCK_SIZE * 4] if bits == 8 else [])
            largest = max(largest, slot_bytes(parts * len(MOMENTS[rule])))
    return min(NUM_SLOTS, num_pages) * largest


def working_bytes(rule: str, shapes: Iterable[Sequence[int]], element_size: int = 4) -> int:
    """Bytes of the GPU that an update works in beside parameters, gradients and state.

    AdamW and Lion are kernels, and take none. Adafactor updates one parameter at a time in fp32: of the largest it
    holds three copies, and four where it is in 16 bits.

    Args:
        rule: "adamw", "lion" or "adafactor".
        shapes: Those of the parameters that are trained.
        element_size: Bytes of a number of theirs.
    """
    if rule != "adafactor":
        return 0
    return (3 if element_size == 4 else 4) * 4 * max((math.prod(shape) for shape in shapes), default=0)
