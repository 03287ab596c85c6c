"""The angles of the rotary embedding on a GPU, against Transformers and float64."""

from __future__ import annotations

import pytest
import torch
from gpu_checks import poison
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from fourfold.kernels.angles import rotary_angles

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("head_dim", [64, 80, 128])
def test_angles_are_those_of_transformers(head_dim: int, dtype: torch.dtype) -> None:
    rope = {"rope_type": "yarn", "rope_theta": 500000.0, "factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(hidden_size=4096, head_dim=head_dim, rope_parameters=rope)
    module = LlamaRotaryEmbedding(config, device="cuda").to("cuda")
    positions = torch.cat([torch.arange(2049), torch.arange(130_000, 131_072)])[None].cuda()
    expected = module(torch.zeros(1, dtype=dtype, device="cuda"), positions)
    poison()
    ours = rotary_angles(positions, module.inv_freq, module.attention_scaling, dtype)
    for made, wanted in zip(ours, expected, strict=True):
        assert (made.dtype, made.shape) == (wanted.dtype, wanted.shape)
        assert torch.equal(made, wanted)


def test_far_positions_are_no_less_exact() -> None:
    positions = torch.tensor([[100_000, 131_071, 1_000_000]], device="cuda")
    inv_freq = 500000.0 ** -(torch.arange(0, 128, 2, device="cuda") / 128)
    cos, sin = rotary_angles(positions, inv_freq, 1.0, torch.float32)
    angles = positions[..., None].double() * inv_freq.double()
    angles = torch.cat([angles, angles], dim=-1)
    bound = angles * 2**-24 + 2**-22
    assert bool(((cos - angles.cos()).abs() <= bound).all())
    assert bool(((sin - angles.sin()).abs() <= bound).all())
