"""Attention of a decode step: the reference against PyTorch's attention; the kernels, interpreted, against it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from few_rows import error
from torch import Tensor

from fourfold.kernels.angles import rotary_angles
from fourfold.kernels.decode_attention import decode_attention_, decode_attention_reference_
from fourfold.kernels.rotary import rotary_reference

SLOTS, LENGTH = 5, 200


def case(
    heads: int, kv_heads: int, head_dim: int, positions: list[int], dtype: torch.dtype, rotary: int | None = None
) -> dict[str, Any]:
    torch.manual_seed(0)
    rows = len(positions)
    cache = torch.randn(2, SLOTS, kv_heads, LENGTH, head_dim).to(dtype)
    where = torch.tensor(positions)
    frequencies = 1 / 100 ** torch.linspace(0, 1, (rotary or head_dim) // 2)
    cos, sin = rotary_angles(where[None], frequencies, 1.0, dtype)
    return {
        "qkv": torch.randn(rows, (heads + 2 * kv_heads) * head_dim).to(dtype),
        "cos": cos[0],
        "sin": sin[0],
        "keys": cache[0],
        "values": cache[1],
        "slots": torch.tensor([3, 0, 4, 1][:rows]),
        "positions": where,
        "scale": head_dim**-0.5,
        "window": None,
        "q_norm": None,
        "k_norm": None,
        "eps": 1e-6,
        "as_operand": False,
    }


def by_pytorch(arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Output, keys and values, of one row after the other in float64."""
    keys, values = arguments["keys"].double(), arguments["values"].double()
    kv_heads, head_dim = keys.shape[1], keys.shape[3]
    heads = arguments["qkv"].shape[1] // head_dim - 2 * kv_heads
    norms = [None if arguments[name] is None else arguments[name].double() for name in ("q_norm", "k_norm")]
    angles = [None if arguments[name] is None else arguments[name].double() for name in ("cos", "sin")]
    qkv = rotary_reference(arguments["qkv"].double(), *angles, heads, kv_heads, None, *norms, arguments["eps"])
    outs = []
    for row, slot, position in zip(qkv, arguments["slots"], arguments["positions"], strict=True):
        q, k, v = row.view(-1, head_dim).split([heads, kv_heads, kv_heads])
        keys[slot, :, position], values[slot, :, position] = k, v
        first = 0 if arguments["window"] is None else max(0, int(position) + 1 - arguments["window"])
        seen = slice(first, int(position) + 1)
        outs.append(
            torch.nn.functional.scaled_dot_product_attention(
                q[None, :, None], keys[None, slot, :, seen], values[None, slot, :, seen], enable_gqa=True
            ).flatten()
        )
    return torch.stack(outs), keys, values


CASES: list[dict[str, Any]] = [
    {"heads": 4, "kv_heads": 2, "head_dim": 16, "positions": [0, 199, 64, 7]},
    {"heads": 3, "kv_heads": 1, "head_dim": 32, "positions": [130]},
    {"heads": 2, "kv_heads": 2, "head_dim": 32, "positions": [63, 65, 128], "rotary": 16},
]


@pytest.mark.parametrize("shape", CASES)
@pytest.mark.parametrize("window", [None, 5, 70])
@pytest.mark.parametrize("normed", [False, True])
def test_operator_on_the_cpu_is_attention_of_each_row(shape: dict[str, Any], window: int | None, normed: bool) -> None:
    arguments = case(**shape, dtype=torch.float32) | {"window": window}
    if normed:
        arguments |= {"q_norm": torch.rand(shape["head_dim"]) + 0.5, "k_norm": torch.rand(shape["head_dim"]) + 0.5}
    expected, keys, values = by_pytorch(arguments)
    names = ("qkv", "cos", "sin", "keys", "values", "slots", "positions")
    ours = decode_attention_(
        *(arguments.pop(name) for name in names[:3]),
        *(held := [arguments.pop(name) for name in names[3:5]]),
        *(arguments.pop(name) for name in names[5:]),
        **arguments,
    )
    assert error(ours, expected) < 1e-6
    assert error(held[0], keys) < 1e-6
    assert error(held[1], values) < 1e-6


@pytest.mark.parametrize("shape", CASES)
@pytest.mark.parametrize(("window", "size", "normed"), [(None, 64, False), (70, 64, True), (5, 256, False)])
def test_kernel_is_as_near_to_float64_as_its_output_can_be(
    shape: dict[str, Any], window: int | None, size: int, normed: bool
) -> None:
    pytest.importorskip("triton")
    from fourfold.kernels import decode_attention_triton

    arguments = case(**shape, dtype=torch.float16) | {"window": window}
    if normed:
        arguments |= {name: (torch.rand(shape["head_dim"]) + 0.5).half() for name in ("q_norm", "k_norm")}
    expected, keys, values = by_pytorch(arguments)
    # What lies behind a row's position is nobody's.
    for slot, position in zip(arguments["slots"], arguments["positions"], strict=True):
        arguments["keys"][slot, :, position + 1 :] = float("nan")
        arguments["values"][slot, :, position + 1 :] = float("nan")
    ours = decode_attention_triton.decode_attention_(*arguments.values(), size=size)
    assert error(ours, expected) < 1e-3
    for slot, position in zip(arguments["slots"], arguments["positions"], strict=True):
        assert error(arguments["keys"][slot, :, : position + 1], keys[slot, :, : position + 1]) < 1e-3
        assert torch.equal(arguments["values"][slot, :, position].double(), values[slot, :, position])


def test_kernel_without_rotation_is_the_reference() -> None:
    pytest.importorskip("triton")
    from fourfold.kernels import decode_attention_triton

    arguments = case(**CASES[0], dtype=torch.float16) | {"cos": None, "sin": None, "as_operand": True}
    twin = {name: value.clone() if isinstance(value, Tensor) else value for name, value in arguments.items()}
    ours = decode_attention_triton.decode_attention_(*arguments.values())
    expected = decode_attention_reference_(*twin.values())
    assert ours.dtype == expected.dtype == torch.float16
    assert error(ours, expected.double()) < 1e-3
    assert torch.equal(arguments["keys"], twin["keys"])


def test_operator_passes_opcheck() -> None:
    arguments = case(**CASES[0], dtype=torch.float32)
    torch.library.opcheck(
        torch.ops.fourfold.decode_attention_.default,
        tuple(arguments.values()),
        test_utils=("test_schema", "test_faketensor"),
    )
