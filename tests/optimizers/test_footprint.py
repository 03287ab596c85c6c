from __future__ import annotations

import pytest
import torch
from torch import nn

from fourfold.optimizers import Adafactor, AdamW, Lion
from fourfold.optimizers.footprint import staging_bytes, state_bytes

SHAPES = {
    "lora": [(16, 4096), (1024, 16), (16, 1024), (4096, 16)] * 3,
    "odd": [(3, 1111), (33,), (64, 100), (70, 71)],
}
RULES = {"adamw": AdamW, "lion": Lion}


def parameters(shapes: list[tuple[int, ...]]) -> list[nn.Parameter]:
    params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    for param in params:
        param.grad = torch.ones_like(param)
    return params


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("placement", ["resident", "paged"])
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("rule", RULES)
def test_state_bytes_are_those_of_the_real_tensors(rule: str, bits: int, placement: str, shapes: str) -> None:
    optimizer = RULES[rule](parameters(SHAPES[shapes]), state_bits=bits, placement=placement)
    moments = optimizer._flat().moments.values()
    real = sum(flat.nbytes for values, absmax in moments for flat in (*values, *absmax))
    assert state_bytes(rule, bits, SHAPES[shapes]) == real


@pytest.mark.parametrize("shapes", SHAPES)
def test_state_bytes_of_adafactor_are_those_of_the_real_tensors(shapes: str) -> None:
    optimizer = Adafactor(parameters(SHAPES[shapes]))
    optimizer.step()
    views = [value for state in optimizer.state.values() for name, value in state.items() if name != "step"]
    assert state_bytes("adafactor", 32, SHAPES[shapes]) == sum(view.nbytes for view in views)


@pytest.mark.parametrize("page_bytes", [1, 50_000, 1 << 26])
@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("rule", RULES)
def test_staging_bytes_are_those_of_the_real_slots(rule: str, bits: int, page_bytes: int) -> None:
    for shapes in SHAPES.values():
        optimizer = RULES[rule](parameters(shapes), state_bits=bits, placement="paged", page_bytes=page_bytes)
        real = sum(slot.memory.nbytes for slot in optimizer._flat().pager.slots)
        foretold = staging_bytes(rule, bits, shapes, page_bytes)
        assert real <= foretold
        if shapes is SHAPES["lora"]:
            assert real == foretold


def test_a_billion_parameters_take_what_the_formulas_say() -> None:
    shapes = [(10**6, 1024)]
    assert state_bytes("adamw", 32, shapes) == 8 * 10**6 * 1024
    assert state_bytes("adamw", 8, shapes) == (2 * 256 + 8) * 4 * 10**6
    assert state_bytes("lion", 8, shapes) == (256 + 4) * 4 * 10**6
    assert state_bytes("adafactor", 32, shapes) == 4 * (10**6 + 1024)
    assert staging_bytes("adamw", 32, shapes) == 3 * 64 * 2**20
