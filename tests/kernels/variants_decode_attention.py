"""The launches of a decode step's attention and norms, in the shapes of Llama-3-8B, Qwen3 and SmolLM2."""

from __future__ import annotations

import triton.language as tl
from compiling import Variant

from fourfold.kernels import decode_attention_triton as attention
from fourfold.kernels import decode_norm_triton as norm


def attend(heads: int, kv_heads: int, head_dim: int, rotary: int, normed: bool, early: bool, dtype: str) -> Variant:
    arguments = {
        **dict.fromkeys(["sums_ptr", "stats_ptr"], "*fp32"),
        **dict.fromkeys(["qkv_ptr", "keys_ptr", "values_ptr"], dtype),
        **dict.fromkeys(["cos_ptr", "sin_ptr"], dtype if rotary else None),
        **dict.fromkeys(["slots_ptr", "positions_ptr"], "*i64"),
        **dict.fromkeys(["q_norm_ptr", "k_norm_ptr"], dtype if normed else None),
        **dict.fromkeys(["slot_stride", "head_stride", "token_stride", "window", "part_size"], "i32"),
        **dict.fromkeys(["scale", "eps"], "fp32"),
        **{"HEADS": heads, "KV_HEADS": kv_heads, "D": head_dim, "ROTARY": rotary},
        **{"BLOCK_G": max(16, heads // kv_heads), "BLOCK_N": attention.BLOCK_N, "EARLY": early, "AT_ONCE": early},
    }
    options = {"num_warps": 8 if early else 4, "num_stages": 2, "launch_pdl": early}
    archs = (90,) if early else (80,)
    return Variant(attention.decode_attention_kernel, arguments, options, ("window", "part_size"), archs)


def join(head_dim: int, parts: int, early: bool, operand: bool) -> Variant:
    arguments = {
        **{"out_ptr": "*fp16" if operand else "*bf16", "sums_ptr": "*fp32", "stats_ptr": "*fp32", "num_parts": "i32"},
        **{"D": head_dim, "BLOCK_P": parts, "DTYPE": tl.bfloat16, "EARLY": early, "AT_ONCE": early},
    }
    options = {"num_warps": max(1, min(4, head_dim // 32)), "launch_pdl": early}
    return Variant(attention.join_parts_kernel, arguments, options, ("num_parts",), (90,) if early else (80,))


def normed(width: int, rank: int, weight: bool, early: bool) -> Variant:
    block_k = 1 << (width - 1).bit_length()
    arguments = {
        **{"out_ptr": "*fp16" if weight else None, "low_ptr": "*bf16" if rank else None},
        **{"x_ptr": "*bf16" if weight else "*fp16", "weight_ptr": "*bf16" if weight else None},
        **{"lora_a_ptr": "*bf16" if rank else None, "num_ranks": "i32", "eps": "fp32", "x_scale": "fp32"},
        **{"K": width, "BLOCK_K": block_k, "EARLY": early, "AT_ONCE": early},
    }
    options = {"num_warps": max(1, min(block_k // 512, 16)), "launch_pdl": early}
    return Variant(norm.decode_norm_kernel, arguments, options, ("num_ranks",), (90,) if early else (80,))


VARIANTS = [
    attend(32, 8, 128, 128, False, True, "*bf16"),
    attend(32, 8, 128, 128, True, False, "*bf16"),
    attend(9, 3, 64, 0, False, True, "*fp16"),
    join(128, 64, True, True),
    join(64, 2, False, False),
    normed(4096, 48, True, True),
    normed(14336, 16, False, False),
]
