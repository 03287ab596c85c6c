"""Reference against plain arithmetic and bitsandbytes, native kernel against reference, and the schema."""

from __future__ import annotations

import itertools
import math
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fourfold.errors import QuantizationError
from fourfold.kernels import blockwise
from fourfold.kernels.blockwise_cpu import INSTRUCTION_SETS, LIBRARY, NativeKernel, cpu_kernel

ROOT = Path(__file__).parents[2]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BLOCK_SIZES = [1, 7, 32, 33, 64, 128, 4096]
SIZES = [0, 1, 2, 31, 63, 64, 65, 127, 1000, 4095, 4097, 300_001]
HAS_COMPILER = shutil.which((sysconfig.get_config_var("CC") or "cc").split()[0]) is not None
INTEGERS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16}


@pytest.fixture(scope="session")
def built_package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the project's own build puts the package, as an installation does it."""
    if not HAS_COMPILER:
        pytest.skip("no C compiler, so the native kernel cannot be built")
    folder = tmp_path_factory.mktemp("build")
    subprocess.run(
        [
            sys.executable,
            "setup.py",
            "-q",
            "build",
            "--build-base",
            str(folder),
            "--build-lib",
            str(folder / "lib"),
        ],
        cwd=ROOT,
        check=True,
    )
    return folder / "lib"


@pytest.fixture(scope="session")
def library(built_package: Path) -> Path:
    return built_package / "fourfold" / "kernels" / LIBRARY.name


@pytest.fixture(params=INSTRUCTION_SETS)
def native(library: Path, request: pytest.FixtureRequest) -> NativeKernel:
    best = NativeKernel(library).instruction_set
    if INSTRUCTION_SETS.index(request.param) > INSTRUCTION_SETS.index(best):
        pytest.skip(f"this processor has no {request.param}")
    return NativeKernel(library, request.param)


def random_tensor(size: int, block_size: int, codebook_size: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """codes, codebook, absmax for `size` elements; the codebook holds both zeros."""
    generator = torch.Generator().manual_seed(seed)
    num_codes = math.ceil(size / 2) if codebook_size == 16 else size
    codes = torch.randint(0, 256, (num_codes,), dtype=torch.uint8, generator=generator)
    codebook = torch.randn(codebook_size, generator=generator)
    codebook[0], codebook[1], codebook[-1] = 0.0, -0.0, 1.0
    absmax = torch.randn(math.ceil(size / block_size), generator=generator).exp()
    return codes, codebook, absmax


def assert_same_bits(ours: Tensor, reference: Tensor) -> None:
    """Equal bits, signs of zero too; NaN, whose payload PyTorch does not fix, where the reference has NaN."""
    assert ours.shape == reference.shape
    assert ours.dtype == reference.dtype
    nan = reference.isnan()
    assert torch.equal(ours.isnan(), nan)
    bits = INTEGERS[reference.dtype]
    assert torch.equal(ours.view(bits)[~nan], reference.view(bits)[~nan])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codebook_size", [16, 256])
def test_reference_is_one_fp32_product_rounded_once(codebook_size: int, dtype: torch.dtype) -> None:
    codes, codebook, absmax = random_tensor(1001, 64, codebook_size)
    numbers = codes.tolist()
    if codebook_size == 16:
        numbers = [nibble for byte in numbers for nibble in (byte >> 4, byte & 15)][:1001]
    expected = torch.stack([codebook[code] * absmax[i // 64] for i, code in enumerate(numbers)]).to(dtype)
    ours = blockwise.dequantize_blockwise_reference(codes, codebook, absmax, 64, [1001], dtype)
    assert_same_bits(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_operator_and_reference_are_bit_equal_to_bitsandbytes(
    quant_type: str, double_quant: bool, dtype: torch.dtype
) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(96, 200, generator=torch.Generator().manual_seed(0)).to(dtype)
    codes, state = functional.quantize_4bit(
        weight, blocksize=64, quant_type=quant_type, compress_statistics=double_quant
    )
    expected = functional.dequantize_4bit(codes, state)
    for scales_of, dequantize in (
        (blockwise.dequantize_scales, blockwise.dequantize_blockwise),
        (blockwise.dequantize_scales_reference, blockwise.dequantize_blockwise_reference),
    ):
        absmax = state.absmax
        if double_quant:
            nested = state.state2
            absmax = scales_of(absmax, nested.code, nested.absmax, state.offset, nested.blocksize)
        ours = dequantize(codes, state.code, absmax, 64, list(weight.shape), dtype)
        if quant_type == "fp4":
            # bitsandbytes' CPU kernel gives code 8 as -0.0, where its own code map and its files have 0.0.
            assert torch.equal(ours, expected)
            continue
        assert_same_bits(ours, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codebook_size", [16, 256])
def test_native_is_bit_equal_to_reference_for_all_sizes(
    native: NativeKernel, codebook_size: int, dtype: torch.dtype
) -> None:
    for size, block_size in itertools.product(SIZES, BLOCK_SIZES):
        codes, codebook, absmax = random_tensor(size, block_size, codebook_size, seed=size + block_size)
        arguments = (codes, codebook, absmax, block_size, [size], dtype)
        assert_same_bits(native.dequantize_blockwise(*arguments), blockwise.dequantize_blockwise_reference(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("codebook_size", [16, 256])
def test_native_is_bit_equal_to_reference_for_special_numbers(
    native: NativeKernel, codebook_size: int, dtype: torch.dtype
) -> None:
    """Infinity, NaN, subnormals of each type, overflow to infinity, products half way between neighbours."""
    size, block_size = 64 * 64, 64
    codes, codebook, _ = random_tensor(size, block_size, codebook_size)
    special = torch.tensor([1e-45, -1e-40, 1.17549435e-38, math.inf, -math.inf, math.nan, 3.4e38, -65520.0, 65519.99])
    codebook[2:11] = special
    halfway = [
        1 + 2**-8,
        1 + 3 * 2**-8,
        1 + 2**-11,
        1 + 3 * 2**-11,
        2**-25,
        3 * 2**-25,
        2**-24 * 1.5,
        2**-134,
    ]
    absmax = torch.cat([special, torch.tensor(halfway), torch.tensor([0.0, -0.0, -1.0])])
    absmax = absmax.repeat(4)[: size // block_size]
    arguments = (codes, codebook, absmax, block_size, [size], dtype)
    assert_same_bits(native.dequantize_blockwise(*arguments), blockwise.dequantize_blockwise_reference(*arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_native_rounds_products_over_all_of_fp32_as_torch_does(native: NativeKernel, dtype: torch.dtype) -> None:
    """Scales that sweep the fp32 numbers, times one: what is left is the rounding alone."""
    step = 40_009  # prime, so that the low bits vary too
    absmax = torch.arange(-(2**31), 2**31, step, dtype=torch.int64).to(torch.int32).view(torch.float32)
    codes = torch.full((absmax.numel() * 16,), 0xFF, dtype=torch.uint8)
    codebook = torch.ones(16)
    ours = native.dequantize_blockwise(codes, codebook, absmax, 32, [absmax.numel(), 32], dtype)
    assert_same_bits(ours, absmax.to(dtype)[:, None].expand(-1, 32).contiguous())


@pytest.mark.parametrize("num_scales", [0, 1, 255, 256, 257, 100_003])
def test_native_scales_round_twice_as_the_reference_does(native: NativeKernel, num_scales: int) -> None:
    codes, code_map, nested = random_tensor(num_scales, 256, 256)
    arguments = (codes, code_map, nested, torch.tensor(0.37), 256)
    assert_same_bits(native.dequantize_scales(*arguments), blockwise.dequantize_scales_reference(*arguments))


def test_native_result_does_not_depend_on_the_number_of_threads(native: NativeKernel) -> None:
    codes, codebook, absmax = random_tensor(1_000_003, 64, 16)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            results.append(native.dequantize_blockwise(codes, codebook, absmax, 64, [1_000_003], torch.bfloat16))
    finally:
        torch.set_num_threads(threads)
    assert_same_bits(results[1], results[0])
    assert_same_bits(results[2], results[0])


def test_native_takes_strided_inputs(native: NativeKernel) -> None:
    codes, codebook, absmax = random_tensor(4096, 64, 16)
    strided = [torch.stack([t, t], dim=1)[:, 0] for t in (codes, codebook, absmax)]
    expected = native.dequantize_blockwise(codes, codebook, absmax, 64, [64, 64], torch.bfloat16)
    assert_same_bits(native.dequantize_blockwise(*strided, 64, [64, 64], torch.bfloat16), expected)


@pytest.mark.parametrize(
    "change",
    [
        {"codes": torch.zeros(31, dtype=torch.uint8)},
        {"codes": torch.zeros(32, dtype=torch.int8)},
        {"codebook": torch.zeros(15)},
        {"codebook": torch.zeros(16, dtype=torch.float64)},
        {"absmax": torch.zeros(0)},
        {"block_size": 0},
        {"dtype": torch.int32},
    ],
    ids=lambda change: next(iter(change)),
)
def test_native_refuses_arrays_that_do_not_fit(native: NativeKernel, change: dict[str, object]) -> None:
    codes, codebook, absmax = random_tensor(64, 64, 16)
    fitting = {"codes": codes, "codebook": codebook, "absmax": absmax, "block_size": 64, "shape": [64]}
    with pytest.raises(QuantizationError, match="do not fit"):
        native.dequantize_blockwise(**{**fitting, "dtype": torch.float32, **change})


def test_native_gives_float64_the_products_that_it_gives_fp32(native: NativeKernel) -> None:
    arguments = (*random_tensor(333, 32, 16), 32, [3, 111])
    wide = native.dequantize_blockwise(*arguments, torch.float64)
    assert torch.equal(wide, native.dequantize_blockwise(*arguments, torch.float32).double())
    assert torch.equal(wide, blockwise.dequantize_blockwise_reference(*arguments, torch.float64))


@pytest.mark.parametrize("codebook_size", [16, 256])
def test_dequantize_blockwise_passes_opcheck(codebook_size: int) -> None:
    codes, codebook, absmax = random_tensor(333, 32, codebook_size)
    arguments = (codes, codebook, absmax, 32, [3, 111], torch.bfloat16)
    torch.library.opcheck(torch.ops.fourfold.dequantize_blockwise.default, arguments)


def test_dequantize_scales_passes_opcheck() -> None:
    codes, code_map, nested = random_tensor(333, 256, 256)
    arguments = (codes, code_map, nested, torch.tensor(0.1), 256)
    torch.library.opcheck(torch.ops.fourfold.dequantize_scales.default, arguments)


def report_of(package: Path) -> str:
    """What `cpu_kernel` says in a process of its own that imports the package from this folder."""
    script = "import fourfold.kernels.blockwise_cpu as kernel; print(kernel.LIBRARY, kernel.cpu_kernel())"
    result = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": str(package)},
        cwd=package,
        check=True,
        capture_output=True,
        text=True,
    )
    path, _, name = result.stdout.strip().rpartition(" ")
    assert Path(path).is_relative_to(package)
    return name


def test_a_build_with_a_compiler_puts_the_native_kernel_in_use(built_package: Path, library: Path) -> None:
    assert report_of(built_package) == NativeKernel(library).instruction_set


def test_a_build_without_a_compiler_succeeds_and_uses_the_reference(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path)]
    environment = {**os.environ, "CC": "/nonexistent/cc", "LDSHARED": "/nonexistent/cc -shared"}
    subprocess.run([*command, "--build-lib", str(tmp_path / "lib")], cwd=ROOT, check=True, env=environment)
    assert report_of(tmp_path / "lib") == "reference"


def test_cpu_kernel_names_the_library_that_stands_beside_it() -> None:
    expected = NativeKernel(LIBRARY).instruction_set if LIBRARY.exists() else "reference"
    assert cpu_kernel() == expected
