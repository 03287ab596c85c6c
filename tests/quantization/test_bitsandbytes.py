"""Tensors against bitsandbytes: its codes are ours, and what it stores is dequantized to its bits."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fourfold.quantization.fp4 import FP4
from fourfold.quantization.layout import from_state_dict
from fourfold.quantization.nf4 import NF4
from fourfold.quantization.scales import NestedScales, dynamic_map
from fourfold.quantization.tensor import DTYPES, quantize

SHAPES = [(1,), (3,), (63, 1), (65,), (7, 33), (129, 100), (96, 576), (72, 288), (513, 257)]


def normal(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def theirs(tensor: Tensor, name: str, nested: bool, block_size: int = 64) -> tuple[dict[str, Tensor], Tensor]:
    """What bitsandbytes stores for a tensor, under its own keys, and what it dequantizes that to."""
    codes, state = bnb.quantize_4bit(tensor, blocksize=block_size, quant_type=name, compress_statistics=nested)
    entries = {"w": codes, **{f"w.{key}": value for key, value in state.as_dict(packed=True).items()}}
    return entries, their_dense(codes, state)


def their_dense(codes: Tensor, state: bnb.QuantState) -> Tensor:
    """bitsandbytes' dequantized tensor, taken as one row.

    Where rows are a multiple of 32 but not of 64, its AVX-512 path scales elements by their neighbours' blocks, and its
    own result is a quarter off the weight (0.49). One row has no such boundary.
    """
    shape, state.shape = state.shape, torch.Size((1, state.shape.numel()))
    dense = bnb.dequantize_4bit(codes, state).reshape(shape)
    state.shape = shape
    return dense


def bits(tensor: Tensor) -> Tensor:
    # FP4's code 8 is +0 in the table that bitsandbytes stores and in most of its CPU paths, and -0 in the one that
    # takes what is left of a row after whole vectors. Adding zero makes both +0, and changes nothing else.
    return (tensor + 0.0).view(torch.int32 if tensor.element_size() == 4 else torch.int16)


def test_codebooks_are_bitsandbytes_own() -> None:
    for number_format in (NF4, FP4):
        assert torch.equal(
            bits(number_format.codebook()), bits(bnb.get_4bit_type(number_format.name, device="cpu").float())
        )
    assert torch.equal(dynamic_map(torch.device("cpu")), bnb.create_dynamic_map())


@pytest.mark.parametrize("block_size", [64, 256, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_codes_and_scales_are_bitsandbytes_own(name: str, dtype: torch.dtype, block_size: int) -> None:
    mismatches = num_codes = 0
    for seed, shape in enumerate([*SHAPES, (1000, 1001)]):
        tensor = normal(shape, dtype, seed)
        entries, _ = theirs(tensor, name, False, block_size)
        ours = quantize(tensor, name, block_size, double_quant=False)
        assert torch.equal(ours.scales.dequantize(), entries["w.absmax"])
        # In a short last block bitsandbytes divides instead of multiplying by the reciprocal, which rounds ties apart.
        whole = tensor.numel() // block_size * block_size
        differs = ours.format.unpack(ours.codes, whole) != ours.format.unpack(entries["w"], whole)
        mismatches += int(differs.sum())
        num_codes += whole
        last = slice(whole, None)
        their_error = (from_state_dict(entries, "w").dequantize(torch.float32) - tensor).reshape(-1)[last].abs()
        our_error = (ours.dequantize(torch.float32) - tensor).reshape(-1)[last].abs()
        torch.testing.assert_close(our_error, their_error, rtol=0, atol=1e-6)
    assert mismatches <= 1e-5 * num_codes


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_dequantize_is_bit_equal_to_bitsandbytes(
    name: str, dtype: torch.dtype, shape: tuple[int, ...], nested: bool
) -> None:
    entries, expected = theirs(normal(shape, dtype), name, nested)
    read = from_state_dict(entries, "w")
    assert read.dtype == dtype
    assert torch.equal(bits(read.dequantize()), bits(expected))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_what_is_read_is_written_back_unchanged(name: str, nested: bool) -> None:
    entries, _ = theirs(normal((129, 100), torch.bfloat16), name, nested)
    written = from_state_dict(entries, "w").state_dict("w")
    assert written.keys() == entries.keys()
    for key, value in entries.items():
        assert written[key].dtype == value.dtype
        assert torch.equal(written[key], value), key


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("name", ["nf4", "fp4"])
def test_bitsandbytes_reads_what_we_write(name: str, nested: bool) -> None:
    ours = quantize(normal((129, 101), torch.bfloat16), name, double_quant=nested)
    entries = ours.state_dict("w")
    codes = entries.pop("w")
    # The prefix goes, as bitsandbytes' own loader drops it.
    state = bnb.QuantState.from_dict({key.removeprefix("w."): value for key, value in entries.items()}, device="cpu")
    assert torch.equal(bits(their_dense(codes, state)), bits(ours.dequantize()))


def test_codes_stored_in_another_dtype_are_read() -> None:
    entries, expected = theirs(normal((64, 64), torch.bfloat16), "nf4", True)
    entries["w"] = entries["w"].view(-1).view(torch.bfloat16)
    assert torch.equal(from_state_dict(entries, "w").dequantize(), expected)


def test_double_quantized_scales_are_as_near_as_bitsandbytes_own() -> None:
    # On near ties bitsandbytes' search takes the farther value of its map; ours never does.
    for seed in range(4):
        absmax = normal((5000,), seed=seed).abs() + 1
        offset = absmax.mean()
        codes, state = bnb.quantize_blockwise(absmax - offset, blocksize=256)
        their_scales = (bnb.dequantize_blockwise(codes, state) + offset).double()
        our_scales = NestedScales.quantize(absmax).dequantize().double()
        theirs_off, ours_off = (their_scales - absmax).abs(), (our_scales - absmax).abs()
        # A last bit of a scale near 3 is 2.4e-7.
        assert (ours_off <= theirs_off + 1e-6).all()
        assert (our_scales != their_scales).double().mean() < 0.01


def test_reading_needs_no_bitsandbytes(tmp_path: Path) -> None:
    for nested in (False, True):
        for name in ("nf4", "fp4"):
            entries, expected = theirs(normal((33, 100), torch.bfloat16), name, nested)
            save_file({**entries, "expected": expected}, tmp_path / f"{name}-{nested}.safetensors")
    program = """
import sys
sys.modules["bitsandbytes"] = None  # an import of it now raises
from pathlib import Path
import torch
from safetensors.torch import load_file
from fourfold.quantization.layout import from_state_dict
paths = sorted(Path(sys.argv[1]).glob("*.safetensors"))
for path in paths:
    entries = load_file(path)
    ours, theirs = from_state_dict(entries, "w").dequantize(), entries["expected"]
    assert torch.equal((ours + 0.0).view(torch.int16), (theirs + 0.0).view(torch.int16))
print(len(paths))
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "4"
