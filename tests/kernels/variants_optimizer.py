"""How `optimizer_triton` launches for LoRA: aligned fp32 and bf16 parameters; and odd sizes."""

from __future__ import annotations

import triton.language as tl
from compiling import Variant

from fourfold.kernels.optimizer_triton import (
    FINISH_BLOCK,
    FINISH_WARPS,
    NUM_WARPS,
    finish_kernel,
    norm_kernel,
    update_kernel,
    update_warps,
)

COMMON = {
    "address_ptr": "*i64",
    "table_ptr": "*i64",
    "chunk_tensor_ptr": "*i32",
    "chunk_index_ptr": "*i32",
    "first_chunk": "i32",
}


def norm(dtype: tl.dtype, aligned: bool) -> Variant:
    return Variant(
        norm_kernel,
        {**COMMON, "partial_ptr": "*fp32", "DTYPE": dtype, "ALIGNED": aligned},
        {"num_warps": NUM_WARPS},
        unaligned=("first_chunk",),
    )


def update(dtype: tl.dtype, bits: int, aligned: bool, lion: bool) -> Variant:
    moment = "*u8" if bits == 8 else "*fp32"
    absmax = "*fp32" if bits == 8 else None
    names = ("map1", "map2", "threshold1", "threshold2", "row", "scale")
    return Variant(
        update_kernel,
        {
            **COMMON,
            **{f"{name}_ptr": "*fp32" for name in names},
            "absmax1_ptr": absmax,
            "absmax2_ptr": None if lion else absmax,
            "chunk_offset_ptr": "*i64",
            "num_params": "i32",
            "first_ptr": moment,
            "second_ptr": None if lion else moment,
            "LION": lion,
            "DTYPE": dtype,
            "BITS": bits,
            "ALIGNED": aligned,
        },
        {"num_warps": update_warps(bits, aligned)},
        unaligned=("first_chunk", "num_params"),
    )


def finish(loss: str | None, lion: bool) -> Variant:
    arguments = dict.fromkeys(("partial_ptr", "step_ptr", "row_ptr", "norm_ptr", "scale_ptr"), "*fp32")
    arguments |= {"address_ptr": "*i64", "table_ptr": "*i64", "hyper_ptr": "*fp64", "loss_ptr": loss}
    arguments |= {"num_partials": "i32", "num_params": "i32", "max_norm": "fp32", "BLOCK": FINISH_BLOCK, "LION": lion}
    return Variant(finish_kernel, arguments, {"num_warps": FINISH_WARPS}, unaligned=("hyper_ptr", "loss_ptr"))


VARIANTS = [
    *(norm(dtype, aligned) for dtype in (tl.float32, tl.bfloat16) for aligned in (True, False)),
    *(finish(loss, lion) for loss in ("*fp32", None) for lion in (False, True)),
    *(
        update(dtype, bits, aligned, lion)
        for dtype in (tl.float32, tl.bfloat16)
        for bits in (8, 32)
        for aligned in (True, False)
        for lion in (False, True)
    ),
]
