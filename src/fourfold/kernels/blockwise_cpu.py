"""Blockwise dequantization on the CPU: loads the compiled blockwise_cpu.c and registers it.

The library is built when the package is installed, if there is a C compiler. Without it the PyTorch
references of `fourfold.kernels.blockwise` stay in place: the same bits, only slower.
"""

from __future__ import annotations

import ctypes
import math
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

import fourfold.kernels.blockwise  # noqa: F401  (defines the operators)
from fourfold.errors import QuantizationError

__all__ = ["LIBRARY", "NativeKernel", "cpu_kernel"]

LIBRARY = Path(__file__).with_name("_blockwise_cpu.so")

# Both in the order of the enumerations in blockwise_cpu.c.
INSTRUCTION_SETS = ("generic", "avx2", "avx512")
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def _openmp_parallel() -> ctypes.c_void_p:
    """The entry point of the OpenMP runtime that torch has loaded, or null, which means one thread.

    Borrowing torch's runtime means borrowing its threads: a second runtime, or a pool of our own, would
    compete with them for the same cores.
    """
    if sys.platform == "win32":
        return ctypes.c_void_p()
    entry = getattr(ctypes.CDLL(None), "GOMP_parallel", None)
    return ctypes.cast(entry, ctypes.c_void_p) if entry else ctypes.c_void_p()


class NativeKernel:
    """The compiled kernel, with the signatures of the operators in `fourfold.kernels.blockwise`.

    Args:
        path: The shared library.
        instruction_set: One of INSTRUCTION_SETS that this machine has; the best one by default.

    Raises:
        OSError: The library cannot be loaded.
        QuantizationError: This machine lacks the instruction set; or, in a call, arrays that do not fit.
    """

    def __init__(self, path: Path, instruction_set: str | None = None) -> None:
        library = ctypes.CDLL(str(path))
        available = INSTRUCTION_SETS[: library.fourfold_instruction_set() + 1]
        self.instruction_set = instruction_set or available[-1]
        if self.instruction_set not in available:
            raise QuantizationError("unknown or missing instruction set", found=instruction_set, allowed=available)
        self._isa = INSTRUCTION_SETS.index(self.instruction_set)
        self._parallel = _openmp_parallel()
        self._function = library.fourfold_dequantize
        pointer, integer, long = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
        self._function.restype = None
        self._function.argtypes = [
            *(pointer, pointer, integer, pointer, pointer, pointer),
            *(long, long, integer, integer, integer, pointer),
        ]

    def dequantize_blockwise(
        self,
        codes: Tensor,
        codebook: Tensor,
        absmax: Tensor,
        block_size: int,
        shape: list[int],
        dtype: torch.dtype,
    ) -> Tensor:
        """See `fourfold.kernels.blockwise.dequantize_blockwise`."""
        if dtype is torch.float64:
            # Products are of fp32 numbers whatever comes after.
            return self._run(codes, codebook, absmax, None, block_size, shape, torch.float32).to(dtype)
        return self._run(codes, codebook, absmax, None, block_size, shape, dtype)

    def dequantize_scales(
        self, codes: Tensor, code_map: Tensor, nested_absmax: Tensor, offset: Tensor, nested_block_size: int
    ) -> Tensor:
        """See `fourfold.kernels.blockwise.dequantize_scales`."""
        return self._run(codes, code_map, nested_absmax, offset, nested_block_size, codes.shape, torch.float32)

    def _run(
        self,
        codes: Tensor,
        codebook: Tensor,
        absmax: Tensor,
        offset: Tensor | None,
        block_size: int,
        shape: list[int] | torch.Size,
        dtype: torch.dtype,
    ) -> Tensor:
        num_elements, codebook_size = math.prod(shape), codebook.numel()
        # The library follows bare pointers, so what it may read is checked here.
        if not (
            codes.dtype is torch.uint8
            and codebook.dtype is absmax.dtype is torch.float32
            and dtype in DTYPES
            and block_size > 0
            and codebook_size in (16, 256)
            and codes.numel() * (2 if codebook_size == 16 else 1) >= num_elements
            and absmax.numel() * block_size >= num_elements
            and (offset is None or (offset.dtype is torch.float32 and offset.numel() == 1))
        ):
            raise QuantizationError(
                "the arrays of a quantized tensor do not fit each other",
                found=f"{codes.numel()} {codes.dtype} codes, {codebook_size} {codebook.dtype} code points, "
                f"{absmax.numel()} {absmax.dtype} scales, blocks of {block_size}, for {dtype} {list(shape)}",
                allowed="uint8 codes, 16 or 256 fp32 code points, one fp32 scale a block, an fp32 scalar "
                "offset and an fp32, fp16 or bf16 result",
            )
        codes, codebook, absmax = codes.contiguous(), codebook.contiguous(), absmax.contiguous()
        out = torch.empty(shape, dtype=dtype)
        self._function(
            codes.data_ptr(),
            codebook.data_ptr(),
            codebook_size,
            absmax.data_ptr(),
            None if offset is None else offset.data_ptr(),
            out.data_ptr(),
            num_elements,
            block_size,
            DTYPES[dtype],
            self._isa,
            torch.get_num_threads(),
            self._parallel,
        )
        return out


def _load() -> NativeKernel | None:
    if not LIBRARY.exists():
        return None
    try:
        return NativeKernel(LIBRARY)
    except OSError as error:
        warnings.warn(f"{LIBRARY} cannot be loaded, so dequantization on the CPU is slower: {error}", stacklevel=2)
        return None


_kernel = _load()
if _kernel is not None:
    torch.library.impl("fourfold::dequantize_blockwise", "cpu", _kernel.dequantize_blockwise)
    torch.library.impl("fourfold::dequantize_scales", "cpu", _kernel.dequantize_scales)


def cpu_kernel() -> str:
    """What dequantizes on the CPU: "avx512", "avx2", "generic" (compiled), or "reference" (PyTorch)."""
    return "reference" if _kernel is None else _kernel.instruction_set
