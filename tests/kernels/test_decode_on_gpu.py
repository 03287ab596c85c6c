"""The kernels of a decode step on a GPU: against float64, and each launch against itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from few_rows import error

from fourfold.kernels import decode_attention_triton, decode_linear_triton
from fourfold.kernels.decode_attention import decode_attention_reference_
from fourfold.kernels.decode_linear import decode_linear, decode_linear_reference
from fourfold.kernels.decode_tiles import Tile
from fourfold.quantization.scales import NestedScales
from fourfold.quantization.tensor import quantize

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16


def layers(rows: list[int], columns: int, double_quant: bool = True) -> tuple[Any, ...]:
    weights = [quantize(torch.randn(count, columns, device="cuda"), "nf4", 64, double_quant) for count in rows]
    codes, codebook = [weight.codes for weight in weights], weights[0].codebook
    if not double_quant:
        return codes, codebook, [weight.scales.dequantize() for weight in weights], None, [], [], 1, rows
    scales = [weight.scales for weight in weights if isinstance(weight.scales, NestedScales)]
    nested = ([each.nested_absmax for each in scales], [each.offset for each in scales])
    return codes, codebook, [each.codes for each in scales], scales[0].code_map, *nested, 256, rows


@pytest.mark.parametrize("inputs", [1, 3, 8, 9, 16, 17, 64])
@pytest.mark.parametrize(
    ("rows", "columns", "double_quant"),
    [
        ([4096, 1024, 1024], 4096, True),
        ([4096], 14336, True),
        ([300, 20], 576, False),
        ([300, 20], 640, True),
        ([40], 64, True),
    ],
)
@pytest.mark.parametrize("lookup", ["table", "shuffle"])
def test_linear_layers_are_as_near_to_float64_as_their_output_can_be(
    inputs: int, rows: list[int], columns: int, double_quant: bool, lookup: str
) -> None:
    torch.manual_seed(0)
    given, total = layers(rows, columns, double_quant), sum(rows)
    x = torch.randn(inputs, columns, device="cuda").half()
    bias, residual = torch.randn(total, device="cuda").to(BF16), torch.randn(inputs, total, device="cuda").to(BF16)
    low = torch.randn(inputs, 16 * len(rows), device="cuda").to(BF16)
    up = torch.randn(total, 16, device="cuda").to(BF16)
    for extras in ((None, None, None, None), (bias, residual, low, up)):
        options: Any = (*extras, "", 1.0, 1.0)
        exact = decode_linear_reference(x.double(), *given, *options, torch.float64)
        ours = decode_linear_triton.decode_linear(x, *given, *options, BF16, lookup=lookup)
        rounded = decode_linear_reference(x, *given, *options, BF16)
        assert error(ours, exact) < 1.1 * error(rounded, exact) + 1e-4
        assert torch.equal(ours, decode_linear_triton.decode_linear(x, *given, *options, BF16, lookup=lookup))


# Members that end in the middle of a tile, and a last program that has fewer tiles.
@pytest.mark.parametrize(("rows", "gates"), [([72, 28, 12], False), ([2056, 2056], True)])
@pytest.mark.parametrize("columns", [2048, 3584, 4096])
@pytest.mark.parametrize("inputs", [1, 2])
@pytest.mark.parametrize("lookup", ["table", "shuffle"])
def test_tiles_of_rows_in_turn_are_the_reference(
    rows: list[int], gates: bool, columns: int, inputs: int, lookup: str
) -> None:
    torch.manual_seed(0)
    given, total = layers(rows, columns), sum(rows)
    x = torch.randn(inputs, columns, device="cuda").half() / columns**0.5
    low = torch.randn(inputs, 32 * len(rows), device="cuda").to(BF16)
    up = torch.randn(total, 32, device="cuda").to(BF16) / 8
    options: Any = (None, None, low, up, "silu" if gates else "", 1.0, 0.25 if gates else 1.0)
    tile = Tile(8, 16, 1, 8, 128, 3)
    ours = decode_linear_triton.decode_linear(x, *given, *options, BF16, lookup=lookup, tile=tile)
    assert error(ours, decode_linear_reference(x.double(), *given, *options, torch.float64).double()) < 8e-3
    for _ in range(3):
        again = decode_linear_triton.decode_linear(x, *given, *options, BF16, lookup=lookup, tile=tile)
        assert torch.equal(ours, again)


@pytest.mark.parametrize("inputs", [1, 8, 20])
def test_gated_layers_are_the_reference(inputs: int) -> None:
    torch.manual_seed(0)
    given = layers([1088, 1088], 512)
    x = torch.randn(inputs, 512, device="cuda").half() / 16
    options: Any = {"dtype": BF16, "activation": "silu", "out_scale": 0.25}
    ours = decode_linear(x, *given, **options)
    exact = decode_linear_reference(x.double(), *given, None, None, None, None, "silu", 1.0, 0.25, torch.float64)
    assert error(ours, exact.double()) < 8e-3


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(32, 8, 128), (9, 3, 64), (8, 1, 256), (14, 2, 64)])
@pytest.mark.parametrize("rows", [1, 5, 32])
@pytest.mark.parametrize("window", [None, 100])
def test_attention_is_the_reference(heads: int, kv_heads: int, head_dim: int, rows: int, window: int | None) -> None:
    torch.manual_seed(0)
    length = 700
    held = torch.randn(2, rows + 1, kv_heads, length, head_dim, device="cuda").to(BF16)
    twin = held.double()
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim, device="cuda").to(BF16)
    angle = 6 * torch.rand(rows, head_dim // 2, device="cuda").repeat(1, 2)
    cos, sin = angle.cos().to(BF16), angle.sin().to(BF16)
    norms = torch.rand(2, head_dim, device="cuda").to(BF16) + 0.5
    slots = torch.randperm(rows + 1, device="cuda")[:rows]
    positions = torch.randint(0, length, (rows,), device="cuda")
    positions[0] = length - 1
    for slot, position in zip(slots.tolist(), positions.tolist(), strict=True):
        held[:, slot, :, position + 1 :] = float("nan")
    options: Any = (head_dim**-0.5, window, *norms, 1e-6, False)
    ours = decode_attention_triton.decode_attention_(qkv, cos, sin, *held, slots, positions, *options)
    wide: Any = (head_dim**-0.5, window, *norms.double(), 1e-6, False)
    exact = decode_attention_reference_(qkv.double(), cos.double(), sin.double(), *twin, slots, positions, *wide)
    assert error(ours, exact) < 1e-2
    for index, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        new = held[:, slot, :, position].double()
        assert error(new, twin[:, slot, :, position]) < 1e-2, index
