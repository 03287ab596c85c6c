"""Code points of bytes of codes, two at a time, from a table in shared memory.

An entry is the two code points of a byte, in fp16. Each of a warp's 32 lanes has a copy of the table in a bank of its
own, 32 KiB in all, so that no two lanes ever wait for each other.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fourfold.kernels.blockwise_triton import code_points

__all__ = ["decoded", "fill_table"]


# Each thread fills entries of its own, 32 copies of each: sixteen bytes at a time, beginning with another part of the
# row than its neighbours, so that no two meet in a bank.
def _fill(threads: int) -> str:
    store = "st.shared.v4.b32 [place], {value, value, value, value};"
    next_part = "add.u32 part, part, 16; and.b32 part, part, 112; add.u32 place, row, part;"
    entry = f"""
    shr.u32 index, number, 4;
    mad.wide.u32 address, index, 4, $1;
    ld.global.nc.f32 even, [address];
    and.b32 index, number, 15;
    mad.wide.u32 address, index, 4, $1;
    ld.global.nc.f32 odd, [address];
    cvt.rn.f16x2.f32 value, odd, even;
    mad.lo.u32 row, number, 128, base;
    and.b32 part, number, 7;
    mul.lo.u32 part, part, 16;
    add.u32 place, row, part;
    {store} {7 * (next_part + store)}
    """
    entries = (f"add.u32 number, number, {threads};\n").join([entry] * (256 // threads))
    return f"""{{
    .shared .align 128 .b8 pairs[32768];
    .reg .u32 number, index, row, part, place, base;
    .reg .b32 value;
    .reg .u64 address;
    .reg .f32 even, odd;
    mov.u32 base, pairs;
    mov.u32 number, %tid.x;
    {entries}bar.sync 0;
    mov.u32 index, %laneid;
    mad.lo.u32 $0, index, 4, base;
    }}"""


_FILL_4, _FILL_8 = (tl.constexpr(_fill(32 * warps)) for warps in (4, 8))


@triton.jit
def fill_table(codebook_ptr: tl.tensor, WARPS: tl.constexpr) -> tl.tensor:
    """Where each lane of 4 or 8 warps finds its copy of the table: entry `byte` 128 * byte bytes behind it.

    An entry is fp16 twice, the code point of the upper four bits first.
    """
    FILL: tl.constexpr = _FILL_4 if WARPS == 4 else _FILL_8
    return tl.inline_asm_elementwise(FILL, "=r,l", [codebook_ptr.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def decoded(word: tl.tensor, table: tl.tensor, codebook_ptr: tl.tensor, LOOKUP: tl.constexpr) -> tl.tensor:
    """fp16 code points [places, 8] of words of codes [places, 1]."""
    element = tl.arange(0, 8)[None, :]
    if LOOKUP == "table":
        # The selector takes a byte out of the word, with zeros above it. Two neighbours ask for the same entry, which
        # the compiler sees, and looks it up once. (Not `pack=2`: which two would be given together is Triton's choice.)
        pair = tl.inline_asm_elementwise(
            """{
            .reg .b32 byte, address;
            prmt.b32 byte, $1, 0, $2;
            mad.lo.u32 address, byte, 128, $3;
            ld.shared.b32 $0, [address];
            }""",
            "=r,r,r,r",
            [word, 0x4440 + element // 2, table],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
        return (pair >> (element % 2 * 16)).to(tl.int16).to(tl.float16, bitcast=True)
    return code_points(word >> ((element ^ 1) * 4), codebook_ptr, BITS=4, LOOKUP=LOOKUP).to(tl.float16)
