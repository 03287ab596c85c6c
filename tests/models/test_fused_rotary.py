"""The rotary embedding of a fused model against the model's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoders import SIZES
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto import CONFIG_MAPPING

from fourfold.models.block import fuse_blocks
from fourfold.models.families import FAMILIES
from fourfold.models.fused_rotary import FusedRotary

FUSED = [name for name, family in FAMILIES.items() if family.fused_layer is not None]


def model_of(model_type: str, **rope: Any) -> nn.Module:
    parameters = {"rope_theta": 10000.0, **rope}
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**SIZES, rope_parameters=parameters))


@pytest.mark.parametrize("model_type", FUSED)
def test_angles_are_those_of_the_model(model_type: str) -> None:
    model = model_of(model_type, rope_type="default")
    own = model.model.rotary_emb
    assert fuse_blocks(model) == SIZES["num_hidden_layers"]
    fused = model.model.rotary_emb
    assert isinstance(fused, FusedRotary)
    assert isinstance(fused, type(own))
    x, positions = torch.zeros(2, 1, dtype=torch.bfloat16), torch.tensor([[0, 1, 2], [5, 0, 1]])
    assert all(map(torch.equal, fused(x, positions), own(x, positions)))
    again = fused
    fuse_blocks(model)
    assert model.model.rotary_emb is again


def test_frequencies_that_change_with_the_positions_go_the_models_own_way() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0}
    model, twin = (model_of("llama", **rope) for _ in range(2))
    fuse_blocks(model)
    x = torch.zeros(1)
    # Beyond the model's 128 positions, and back.
    for length in (8, 300, 8):
        positions = torch.arange(length)[None]
        assert all(map(torch.equal, model.model.rotary_emb(x, positions), twin.model.rotary_emb(x, positions)))
