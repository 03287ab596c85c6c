"""Blockwise dequantization in Triton: one launch for codes and scales, nested or not.

A tile is WORDS 32-bit words of codes. A thread takes whole words: one load of codes, one scale, eight products and one
store of 16 bytes for each. Everything but the store of the result is small, so what counts is that the lookup in the
codebook costs few instructions and that the stores are wide.

Weights of whole tiles, which those of real models are, take kernels of their own (`is_even`): without masks, and with
every load that waits for no other one issued before anything waits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fourfold.kernels.launching import on_device

__all__ = [
    "EVEN",
    "WORDS",
    "NestedParts",
    "code_points",
    "dequantize",
    "even_tile_size",
    "geometry",
    "is_even",
    "product_tile",
    "write_even_tile",
]

WORDS = 512

# The tiles of even weights: a program writes CHUNKS runs of THREADS words, a word a thread; both are powers of two.
EVEN = {"THREADS": 128, "CHUNKS": 2}


@triton.jit
def block_scales(
    block: tl.tensor,
    mask: tl.tensor,
    scales_ptr: tl.tensor,
    code_map_ptr: tl.tensor,
    nested_absmax_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    NESTED_SHIFT: tl.constexpr,
) -> tl.tensor:
    """fp32 scales of the blocks `block`: two roundings where they are nested, so fused multiply-adds must be off."""
    scale = tl.load(scales_ptr + block, mask=mask, other=0)
    if code_map_ptr is not None:
        nested = tl.load(nested_absmax_ptr + (block >> NESTED_SHIFT), mask=mask, other=0.0)
        scale = tl.load(code_map_ptr + scale.to(tl.int32)) * nested + tl.load(offset_ptr)
    return scale


@triton.jit
def code_points(shifted: tl.tensor, codebook_ptr: tl.tensor, BITS: tl.constexpr, LOOKUP: tl.constexpr) -> tl.tensor:
    """fp32 code points of the lowest BITS bits of each element of `shifted` (int32).

    LOOKUP: "shuffle" holds the 16 code points of 4 bits in the lanes of a warp. "gather" reads them from memory: for 8
    bits, and for Triton's interpreter, which has no warps.
    """
    if LOOKUP == "shuffle":
        # The same operands for every element: the compiler keeps one copy of this load.
        held = tl.inline_asm_elementwise(
            """{
            .reg .u32 lane; .reg .u64 address;
            mov.u32 lane, %laneid;
            and.b32 lane, lane, 15;
            mad.wide.u32 address, lane, 4, $1;
            ld.global.nc.b32 $0, [address];
            }""",
            "=r,l",
            [codebook_ptr.to(tl.int64)],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        # Segments of 16 lanes: only the lowest four bits of the index count.
        point = tl.inline_asm_elementwise(
            "shfl.sync.idx.b32 $0, $1, $2, 0x101f, 0xffffffff;",
            "=r,r,r",
            [held, shifted],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        return point.to(tl.float32, bitcast=True)
    return tl.load(codebook_ptr + (shifted & (2**BITS - 1)))


@triton.jit
def product_tile(
    tile: tl.tensor,
    num_elements: tl.tensor,
    codes_ptr: tl.tensor,
    codebook_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    code_map_ptr: tl.tensor,
    nested_absmax_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    BITS: tl.constexpr,
    BLOCK_SHIFT: tl.constexpr,
    NESTED_SHIFT: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    LOOKUP: tl.constexpr,
    WORDS: tl.constexpr,
) -> tl.tensor:
    """fp32 [WORDS, 32 // BITS] products of tile number `tile`, and the mask of those that exist.

    IS_WHOLE: The elements are whole words, and the codes aligned to words. Otherwise codes are read byte by byte.
    """
    PER_WORD: tl.constexpr = 32 // BITS
    TILE: tl.constexpr = WORDS * PER_WORD
    word = tl.arange(0, WORDS)
    within = tl.arange(0, PER_WORD)
    start = tile.to(tl.int64) * TILE
    remaining = tl.minimum(num_elements - start, TILE).to(tl.int32)
    # A tile of 2048 or 4096 elements may begin inside a block, but a word never spans two.
    first_block = (start >> BLOCK_SHIFT).to(tl.int32)
    inside = (start - (first_block.to(tl.int64) << BLOCK_SHIFT)).to(tl.int32)
    block = first_block + ((inside + word * PER_WORD) >> BLOCK_SHIFT)
    has_word = word * PER_WORD < remaining
    scale = block_scales(
        block, has_word, scales_ptr, code_map_ptr, nested_absmax_ptr, offset_ptr, NESTED_SHIFT=NESTED_SHIFT
    )
    # The even element of a byte is in the high nibble.
    shift = (within ^ 1) * 4 if BITS == 4 else within * 8
    if IS_WHOLE:
        words_ptr = codes_ptr.to(tl.pointer_type(tl.int32)) + tile.to(tl.int64) * WORDS
        shifted = tl.load(words_ptr + word, mask=has_word, other=0)[:, None] >> shift[None, :]
        mask = has_word[:, None] & (within[None, :] >= 0)
    else:
        element = word[:, None] * PER_WORD + within[None, :]
        mask = element < remaining
        bytes_ptr = codes_ptr + tile.to(tl.int64) * (WORDS * 4)
        byte = tl.load(bytes_ptr + (element * BITS >> 3), mask=mask, other=0).to(tl.int32)
        shifted = byte >> (shift[None, :] & 7)
    return code_points(shifted, codebook_ptr, BITS=BITS, LOOKUP=LOOKUP) * scale[:, None], mask


@triton.jit
def dequantize_kernel(
    out_ptr: tl.tensor,
    num_elements: tl.tensor,
    codes_ptr: tl.tensor,
    codebook_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    code_map_ptr: tl.tensor,
    nested_absmax_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    BITS: tl.constexpr,
    BLOCK_SHIFT: tl.constexpr,
    NESTED_SHIFT: tl.constexpr,
    IS_WHOLE: tl.constexpr,
    LOOKUP: tl.constexpr,
    WORDS: tl.constexpr,
) -> None:
    PER_WORD: tl.constexpr = 32 // BITS
    tile = tl.program_id(0)
    product, mask = product_tile(
        *(tile, num_elements, codes_ptr, codebook_ptr, scales_ptr, code_map_ptr, nested_absmax_ptr, offset_ptr),
        *(BITS, BLOCK_SHIFT, NESTED_SHIFT, IS_WHOLE, LOOKUP, WORDS),
    )
    element = tl.arange(0, WORDS)[:, None] * PER_WORD + tl.arange(0, PER_WORD)[None, :]
    tile_ptr = out_ptr + tile.to(tl.int64) * (WORDS * PER_WORD)
    tl.store(tile_ptr + element, product.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def write_even_tile(
    out_ptr: tl.tensor,
    out_tile: tl.tensor,
    tile: tl.tensor,
    codes_ptr: tl.tensor,
    codebook_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    code_map_ptr: tl.tensor,
    nested_absmax_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    COLUMNS: tl.constexpr,
    GAP: tl.constexpr,
    BLOCK_SHIFT: tl.constexpr,
    NESTED_SHIFT: tl.constexpr,
    LOOKUP: tl.constexpr,
    THREADS: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    """Decode tile number `tile` of a weight of 4 bits to where tile number `out_tile` of the output is.

    COLUMNS, GAP: a row's elements, and the elements between two rows of the output, below 2**31 where there is a gap.
    """
    TILE: tl.constexpr = THREADS * CHUNKS * 8
    thread = tl.arange(0, THREADS)
    words_ptr = codes_ptr.to(tl.pointer_type(tl.int32)) + tile.to(tl.int64) * (THREADS * CHUNKS)
    first_block = tile.to(tl.int64) * (TILE >> BLOCK_SHIFT)
    words = tl.tuple(())
    scales = tl.tuple(())
    for i in tl.static_range(CHUNKS):
        words += (tl.load(words_ptr + i * THREADS + thread),)
    for i in tl.static_range(CHUNKS):
        scales += (tl.load(scales_ptr + first_block + ((i * THREADS + thread) * 8 >> BLOCK_SHIFT)),)
    if code_map_ptr is not None:
        nested = tl.load(nested_absmax_ptr + (first_block >> NESTED_SHIFT))
        offset = tl.load(offset_ptr)
    # Or else the compiler issues the loads of words behind those of scales, one latency after the other.
    tl.debug_barrier()
    if code_map_ptr is not None:
        decoded = tl.tuple(())
        for i in tl.static_range(CHUNKS):
            decoded += (tl.load(code_map_ptr + scales[i].to(tl.int32)) * nested + offset,)
    else:
        decoded = scales
    within = tl.arange(0, 8)
    # The even element of a byte is in the high nibble.
    shift = (within ^ 1) * 4
    start = out_tile.to(tl.int64) * TILE
    for i in tl.static_range(CHUNKS):
        point = code_points(words[i][:, None] >> shift[None, :], codebook_ptr, BITS=4, LOOKUP=LOOKUP)
        product = point * decoded[i][:, None]
        element = (i * THREADS + thread) * 8
        if GAP:
            # One division for all words of a run where a row is whole runs, else one a word.
            first = (out_tile * TILE + i * THREADS * 8).to(tl.uint32)
            row = (first + (thread * 8).to(tl.uint32)) // COLUMNS if COLUMNS % (THREADS * 8) else first // COLUMNS
            element += row.to(tl.int32) * GAP
        place = element[:, None] + within[None, :]
        tl.store(out_ptr + start + place, product.to(out_ptr.dtype.element_ty))


@triton.jit
def dequantize_even_kernel(
    out_ptr: tl.tensor,
    codes_ptr: tl.tensor,
    codebook_ptr: tl.tensor,
    scales_ptr: tl.tensor,
    code_map_ptr: tl.tensor,
    nested_absmax_ptr: tl.tensor,
    offset_ptr: tl.tensor,
    BLOCK_SHIFT: tl.constexpr,
    NESTED_SHIFT: tl.constexpr,
    LOOKUP: tl.constexpr,
    THREADS: tl.constexpr,
    CHUNKS: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    write_even_tile(
        *(out_ptr, tile, tile, codes_ptr, codebook_ptr, scales_ptr, code_map_ptr, nested_absmax_ptr, offset_ptr),
        *(1, 0, BLOCK_SHIFT, NESTED_SHIFT, LOOKUP, THREADS, CHUNKS),
    )


class NestedParts(NamedTuple):
    """What quantized scales are decoded with: fp32 [256], fp32 [nested blocks], fp32 scalar, and the block size."""

    code_map: Tensor
    nested_absmax: Tensor
    offset: Tensor
    block_size: int


def geometry(
    codes: Tensor, codebook: Tensor, num_elements: int, block_size: int, nested: NestedParts | None
) -> dict[str, int | bool | str]:
    """The constants of `product_tile`; block sizes are powers of two, of at least a word's elements."""
    bits = 4 if codebook.numel() == 16 else 8
    return {
        "BITS": bits,
        "BLOCK_SHIFT": block_size.bit_length() - 1,
        "NESTED_SHIFT": 0 if nested is None else nested.block_size.bit_length() - 1,
        "IS_WHOLE": num_elements % (32 // bits) == 0 and codes.data_ptr() % 4 == 0,
        "LOOKUP": "shuffle" if bits == 4 and codes.is_cuda else "gather",
        "WORDS": WORDS,
    }


def even_tile_size() -> int:
    """Elements of a program of the kernels of even weights."""
    return EVEN["THREADS"] * EVEN["CHUNKS"] * 8


def is_even(codes: Tensor, codebook: Tensor, num_elements: int, block_size: int, nested_block_size: int | None) -> bool:
    """Whether a weight is whole tiles of whole blocks, each tile within one nested block, if there are any."""
    tile = even_tile_size()
    return (
        num_elements % tile == 0 == tile % block_size
        and codebook.numel() == 16
        and codes.data_ptr() % 4 == 0
        and (nested_block_size is None or block_size * nested_block_size % tile == 0)
    )


def dequantize(
    codes: Tensor,
    codebook: Tensor,
    scales: Tensor,
    block_size: int,
    shape: list[int],
    dtype: torch.dtype,
    nested: NestedParts | None = None,
) -> Tensor:
    """`fourfold.kernels.blockwise.dequantize_blockwise`, and `dequantize_nested` where `nested` is given."""
    out = torch.empty(shape, dtype=dtype, device=codes.device)
    num_elements = out.numel()
    if num_elements == 0:
        return out
    code_map, nested_absmax, offset, nested_block_size = nested or (None, None, None, None)
    constants = geometry(codes, codebook, num_elements, block_size, nested)
    if is_even(codes, codebook, num_elements, block_size, nested_block_size):
        with on_device(codes):
            dequantize_even_kernel[(num_elements // even_tile_size(),)](
                *(out, codes, codebook, scales, code_map, nested_absmax, offset),
                **{name: constants[name] for name in ("BLOCK_SHIFT", "NESTED_SHIFT", "LOOKUP")},
                **EVEN,
                num_warps=EVEN["THREADS"] // 32,
                enable_fp_fusion=False,
            )
        return out
    programs = triton.cdiv(num_elements, WORDS * (32 // int(constants["BITS"])))
    with on_device(codes):
        dequantize_kernel[(programs,)](
            *(out, num_elements, codes, codebook, scales, code_map, nested_absmax, offset),
            **constants,
            num_warps=4,
            enable_fp_fusion=False,
        )
    return out
