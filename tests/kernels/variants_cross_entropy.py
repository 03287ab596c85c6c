"""The launches of the cross entropy kernel on the vocabularies of real models."""

from __future__ import annotations

from compiling import Variant

from fourfold.kernels.cross_entropy_triton import cross_entropy_kernel


def _variant(dtype: str, gradient: bool, vocab: int) -> Variant:
    width = 4 if dtype == "fp32" else 8
    arguments = {
        "logits_ptr": f"*{dtype}",
        "targets_ptr": "*i64",
        "loss_ptr": "*fp32",
        "ranked_first_ptr": "*i8",
        "row_stride": "i32",
        "VOCAB": vocab,
        "GRADIENT": gradient,
        "LANES": 1024 if vocab % width else 2048,
        "WIDTH": width,
    }
    return Variant(cross_entropy_kernel, arguments, {"num_warps": 32})


VARIANTS = [
    *[_variant(dtype, gradient, 128256) for dtype in ("bf16", "fp16", "fp32") for gradient in (False, True)],
    *[_variant("bf16", True, vocab) for vocab in (32000, 49152, 50257, 151936, 262144)],
    *[_variant(dtype, False, 50257) for dtype in ("bf16", "fp32")],
    _variant("fp32", True, 50257),
]
