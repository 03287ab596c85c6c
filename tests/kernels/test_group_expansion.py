"""Linears that share a format, written at once: the kernel and the operator against one linear at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from fourfold.errors import QuantizationError
from fourfold.kernels.group_expansion import expand_group_reference
from fourfold.kernels.low_rank import new_extended
from fourfold.quantization.scales import NestedScales, PlainScales
from fourfold.quantization.tensor import QuantizedTensor, are_alike, expand_alike_, quantize

# Columns, padded ranks, and the rows and ranks of the linears; None for no adapter. All are whole tiles.
GROUPS: dict[str, tuple[int, int, list[tuple[int, int | None]]]] = {
    "one": (1024, 16, [(8, 16)]),
    "query, key, value": (1024, 32, [(8, 5), (4, 1), (4, 16)]),
    "rows that end within a run of words": (768, 16, [(32, 3), (16, None)]),
    "rows shorter than a tile that are whole runs": (3072, 16, [(4, 4), (4, 4), (8, 8)]),
    "ranks that are full": (1024, 16, [(4, 8), (4, 8)]),
    "ranks of zero": (1024, 16, [(4, 0), (4, 2)]),
    "an adapter on none": (1024, 16, [(4, None), (4, None)]),
    "no ranks": (1024, 0, [(4, None), (8, None), (4, None)]),
}


@dataclass
class Group:
    weights: list[QuantizedTensor]
    lora_a: list[Tensor | None]
    lora_b: list[Tensor | None]
    scalings: list[float]
    columns: int
    padded_ranks: int

    @classmethod
    def random(
        cls, columns: int, padded_ranks: int, linears: Sequence[tuple[int, int | None]], device: str, **options: Any
    ) -> Group:
        torch.manual_seed(columns)
        return cls(
            [quantize(torch.randn(rows, columns, device=device), **options) for rows, _ in linears],
            [None if rank is None else torch.randn(rank, columns, device=device) for _, rank in linears],
            [None if rank is None else torch.randn(rows, rank, device=device) for rows, rank in linears],
            [0.7 + index for index in range(len(linears))],
            columns,
            padded_ranks,
        )

    @property
    def num_rows(self) -> list[int]:
        return [weight.shape[0] for weight in self.weights]

    def arguments(self) -> tuple[Any, ...]:
        """Those of the operator behind `out`."""
        first = self.weights[0]
        scales = [weight.scales for weight in self.weights]
        codes = [weight.codes for weight in self.weights]
        linears = (self.num_rows, self.columns, self.lora_a, self.lora_b, self.scalings)
        if isinstance(first.scales, PlainScales):
            plain = [each.dequantize() for each in scales]
            return (codes, first.codebook, plain, None, [], [], first.block_size, 1, *linears)
        nested = [each for each in scales if isinstance(each, NestedScales)]
        parts = ([each.codes for each in nested], first.scales.code_map, [each.nested_absmax for each in nested])
        return (codes, first.codebook, *parts, [each.offset for each in nested], first.block_size, 256, *linears)

    def unwritten(self, dtype: torch.dtype) -> Tensor:
        """NaN, between the rows too."""
        rows = sum(self.num_rows) + self.padded_ranks
        like = torch.empty(0, dtype=dtype, device=self.weights[0].device)
        out = new_extended(like, rows, self.columns, self.padded_ranks)
        with_gaps(out).fill_(torch.nan)
        return out

    def one_by_one(self, dtype: torch.dtype) -> Tensor:
        out = self.unwritten(dtype)
        row = rank_row = 0
        used = sum(0 if a is None else len(a) for a in self.lora_a)
        for weight, a, b, scaling in zip(self.weights, self.lora_a, self.lora_b, self.scalings, strict=True):
            place: dict[str, Any] = {"row": row, "total_rows": sum(self.num_rows), "used_ranks": used}
            weight.expand_(out, lora_a=a, lora_b=b, scaling=scaling, rank_row=rank_row, **place)
            row, rank_row = row + weight.shape[0], rank_row + (0 if a is None else len(a))
        return out


def with_gaps(out: Tensor) -> Tensor:
    return out.as_strided((len(out), out.stride(0)), (out.stride(0), 1))


def assert_same(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(with_gaps(ours), with_gaps(expected), rtol=0, atol=0, equal_nan=True)


def kernel() -> Callable[..., None]:
    pytest.importorskip("triton")
    from fourfold.kernels.group_expansion_triton import expand_group_, takes

    def expand(out: Tensor, *arguments: Any) -> None:
        codes, codebook, _, code_map, _, _, block_size, nested_block_size, num_rows, columns = arguments[:10]
        nested = None if code_map is None else nested_block_size
        assert takes(out, codes, codebook, block_size, nested, num_rows, columns)
        expand_group_(out, *arguments)

    return expand


@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize("double_quant", [False, True])
def test_operator_writes_what_one_linear_after_the_other_does(name: str, double_quant: bool) -> None:
    group = Group.random(*GROUPS[name], "cpu", double_quant=double_quant)
    out = group.unwritten(torch.bfloat16)
    assert are_alike(group.weights)
    expand_alike_(out, group.weights, group.lora_a, group.lora_b, group.scalings)
    assert_same(out, group.one_by_one(torch.bfloat16))


# Not bf16: the interpreter cuts numbers off where the GPU rounds them.
@pytest.mark.parametrize("name", GROUPS)
@pytest.mark.parametrize(("double_quant", "dtype"), [(False, torch.float32), (True, torch.float16)])
def test_kernel_is_bit_equal_to_reference(name: str, double_quant: bool, dtype: torch.dtype) -> None:
    expand = kernel()
    group = Group.random(*GROUPS[name], "cpu", double_quant=double_quant)
    out, expected = group.unwritten(dtype), group.unwritten(dtype)
    expand(out, *group.arguments())
    expand_group_reference(expected, *group.arguments())
    assert_same(out, expected)


def test_kernel_takes_adapters_of_another_dtype_and_of_any_strides() -> None:
    expand = kernel()
    group = Group.random(1024, 16, [(8, 4), (4, 4)], "cpu")
    group.lora_a[0] = torch.randn(1024, 4).t()
    group.lora_b[1] = torch.randn(4, 4).half()
    out, expected = group.unwritten(torch.float32), group.unwritten(torch.float32)
    expand(out, *group.arguments())
    expand_group_reference(expected, *group.arguments())
    assert_same(out, expected)


@pytest.mark.parametrize(
    ("columns", "linears"),
    [(1024, [(4, None)] * 4), (1024, [(4, None), (3, None)]), (1028, [(1024, None)])],
    ids=["four linears", "no whole tiles", "rows of no whole words"],
)
def test_groups_that_are_not_for_the_kernel_are_not_taken(columns: int, linears: list[tuple[int, int | None]]) -> None:
    pytest.importorskip("triton")
    from fourfold.kernels.group_expansion_triton import takes

    group = Group.random(columns, 0, linears, "cpu")
    codes, codebook = group.arguments()[:2]
    assert not takes(group.unwritten(torch.float16), codes, codebook, 64, 256, group.num_rows, columns)


def test_weights_of_unlike_formats_or_blocks_are_not_alike() -> None:
    weight = torch.randn(4, 1024)
    nested, plain = quantize(weight), quantize(weight, double_quant=False)
    assert are_alike([nested, quantize(weight + 1)])
    assert are_alike([plain, quantize(weight + 1, double_quant=False)])
    others = [plain, quantize(weight, "fp4"), quantize(weight, block_size=128), quantize(weight[:, :512])]
    assert not any(are_alike([nested, other]) for other in others)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("lora_a", [torch.zeros(3, 1023), None]),
        ("lora_b", [torch.zeros(4, 4), None]),
        ("lora_b", [None, None]),
        ("padded_ranks", 2),
    ],
)
def test_a_linear_that_does_not_fit_its_place_is_refused(name: str, change: Any) -> None:
    group = Group.random(1024, 16, [(4, 3), (4, None)], "cpu")
    setattr(group, name, change)
    out = group.unwritten(torch.float32)
    with pytest.raises(QuantizationError, match="do not fit"):
        expand_alike_(out, group.weights, group.lora_a, group.lora_b, group.scalings)


@pytest.mark.parametrize("double_quant", [False, True])
def test_operator_passes_opcheck(double_quant: bool) -> None:
    group = Group.random(64, 16, [(8, 3), (4, None)], "cpu", double_quant=double_quant)
    out = group.unwritten(torch.float32).nan_to_num_(0)
    torch.library.opcheck(torch.ops.fourfold.expand_group_.default, (out, *group.arguments()))
