"""The angles of the rotary embedding: the reference against Transformers and float64, the Triton kernel against it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fourfold.kernels.angles import rotary_angles

pytest.importorskip("triton")

from fourfold.kernels import angles_triton

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
ROPES = [
    {"rope_type": "default", "rope_theta": 500000.0},
    {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64},
]
# Rows that fill no program, positions in any order, as packed documents and padding on the left make them.
POSITIONS = [
    torch.arange(19)[None],
    torch.tensor([[0, 1, 2, 0, 1, 131071], [7, 8, 9, 10, 11, 12]]),
    torch.tensor([[40_000, 3]], dtype=torch.int32),
]


def embedding(rope: dict[str, object], head_dim: int = 24) -> LlamaRotaryEmbedding:
    config = LlamaConfig(hidden_size=48, num_attention_heads=2, head_dim=head_dim, rope_parameters=dict(rope))
    return LlamaRotaryEmbedding(config)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions", POSITIONS, ids=str)
@pytest.mark.parametrize("rope", ROPES, ids=lambda rope: rope["rope_type"])
def test_reference_equals_transformers(rope: dict[str, object], positions: Tensor, dtype: torch.dtype) -> None:
    module = embedding(rope)
    ours = rotary_angles(positions, module.inv_freq, module.attention_scaling, dtype)
    expected = module(torch.zeros(1, dtype=dtype), positions)
    assert all(map(torch.equal, ours, expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("positions", POSITIONS, ids=str)
@pytest.mark.parametrize("head_dim", [24, 64])
def test_kernel_equals_the_reference(head_dim: int, positions: Tensor, dtype: torch.dtype) -> None:
    module = embedding(ROPES[2], head_dim)
    arguments = (positions, module.inv_freq, module.attention_scaling, dtype)
    ours, expected = angles_triton.rotary_angles(*arguments), rotary_angles(*arguments)
    # The interpreter takes NumPy's cosine, and cuts fp32 off to bf16 where a GPU rounds it.
    bound = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 2**-22}[dtype]
    for made, wanted in zip(ours, expected, strict=True):
        assert (made.dtype, made.shape) == (dtype, (*positions.shape, head_dim))
        torch.testing.assert_close(made, wanted, rtol=bound, atol=bound)


def test_angles_of_far_positions_are_those_of_float64_within_the_rounding_of_the_angle() -> None:
    positions = torch.tensor([[100_000, 131_071, 1_000_000]])
    module = embedding(ROPES[0], 64)
    cos, sin = rotary_angles(positions, module.inv_freq, 1.0, torch.float32)
    angles = positions[..., None].double() * module.inv_freq.double()
    angles = torch.cat([angles, angles], dim=-1)
    bound = angles * 2**-24 + 2**-22
    assert bool(((cos - angles.cos()).abs() <= bound).all())
    assert bool(((sin - angles.sin()).abs() <= bound).all())
