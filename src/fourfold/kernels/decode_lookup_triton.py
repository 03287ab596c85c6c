"""Code points of bytes of codes, two at a time, from a table in shared memory; and of scales, one at a time.

An entry is the two code points of a byte, in fp16. Each of a warp's 32 lanes has a copy of the table in a bank of its
own, 32 KiB in all, so that no two lanes ever wait for each other. Scales are few: their code map lies there once.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fourfold.kernels.blockwise_triton import code_points

__all__ = ["decoded", "decoded_scale", "fill_table"]


# Each thread fills entries of its own, 32 copies of each: sixteen bytes at a time, beginning with another part of the
# row than its neighbours, so that no two meet in a bank.
def _fill(threads: int, has_map: bool) -> str:
    store = "st.shared.v4.b32 [place], {value, value, value, value};"
    next_part = "add.u32 part, part, 16; and.b32 part, part, 112; add.u32 place, row, part;"
    codebook = "$2" if has_map else "$1"
    entry = f"""
    shr.u32 index, number, 4;
    mad.wide.u32 address, index, 4, {codebook};
    ld.global.nc.f32 even, [address];
    and.b32 index, number, 15;
    mad.wide.u32 address, index, 4, {codebook};
    ld.global.nc.f32 odd, [address];
    cvt.rn.f16x2.f32 value, odd, even;
    mad.lo.u32 row, number, 128, base;
    and.b32 part, number, 7;
    mul.lo.u32 part, part, 16;
    add.u32 place, row, part;
    {store} {7 * (next_part + store)}
    """
    point = """
    mad.wide.u32 address, number, 4, $3;
    ld.global.nc.f32 even, [address];
    mad.lo.u32 place, number, 4, base;
    st.shared.f32 [place + 32768], even;
    """
    entry += point if has_map else ""
    entries = (f"add.u32 number, number, {threads};\n").join([entry] * (256 // threads))
    return f"""{{
    .shared .align 128 .b8 pairs[{32768 + 1024 * has_map}];
    .reg .u32 number, index, row, part, place, base;
    .reg .b32 value;
    .reg .u64 address;
    .reg .f32 even, odd;
    mov.u32 base, pairs;
    mov.u32 number, %tid.x;
    {entries}bar.sync 0;
    mov.u32 index, %laneid;
    mad.lo.u32 $0, index, 4, base;
    {"add.u32 $1, base, 32768;" if has_map else ""}
    }}"""


_FILL_4, _FILL_8 = (tl.constexpr(_fill(32 * warps, False)) for warps in (4, 8))
_FILL_BOTH_4, _FILL_BOTH_8 = (tl.constexpr(_fill(32 * warps, True)) for warps in (4, 8))


@triton.jit
def fill_table(codebook_ptr: tl.tensor, code_map_ptr: tl.tensor, WARPS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Where each lane of 4 or 8 warps finds its copy of the table, and all of them the code map, if there is one.

    Entry `byte` is 128 * byte bytes behind the one, and 4 * byte behind the other. An entry of the table is fp16 twice,
    the code point of the upper four bits first.
    """
    codebook = codebook_ptr.to(tl.int64)
    if code_map_ptr is None:
        FILL: tl.constexpr = _FILL_4 if WARPS == 4 else _FILL_8
        table = tl.inline_asm_elementwise(FILL, "=r,l", [codebook], dtype=tl.int32, is_pure=False, pack=1)
        map_at = table
    else:
        BOTH: tl.constexpr = _FILL_BOTH_4 if WARPS == 4 else _FILL_BOTH_8
        pointers = [codebook, code_map_ptr.to(tl.int64)]
        table, map_at = tl.inline_asm_elementwise(
            BOTH, "=r,=r,l,l", pointers, dtype=(tl.int32, tl.int32), is_pure=False, pack=1
        )
    return table, map_at


@triton.jit
def decoded_scale(code: tl.tensor, map_at: tl.tensor, code_map_ptr: tl.tensor, LOOKUP: tl.constexpr) -> tl.tensor:
    """fp32 code points of int32 codes of scales."""
    if LOOKUP == "table":
        return tl.inline_asm_elementwise(
            "{ .reg .b32 address; mad.lo.u32 address, $1, 4, $2; ld.shared.f32 $0, [address]; }",
            "=r,r,r",
            [code, map_at],
            dtype=tl.float32,
            is_pure=True,
            pack=1,
        )
    return tl.load(code_map_ptr + code)


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
