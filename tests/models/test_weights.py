from __future__ import annotations

from pathlib import Path

import pytest
import torch
from twins import original_model, quantized_model

from fourfold.errors import AdapterError, CheckpointError
from fourfold.models.weights import OriginalWeights


@pytest.mark.parametrize("shard_size", ["5GB", "50KB"], ids=["one file", "shards"])
def test_every_weight_is_the_models(shard_size: str, tmp_path: Path) -> None:
    model = original_model(torch.bfloat16)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "50KB")
    weights = OriginalWeights(tmp_path)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            assert torch.equal(weights(name), module.weight)


def test_a_missing_weight_is_refused_by_name(tmp_path: Path) -> None:
    original_model().save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match=r"model\.layers\.7\.mlp\.up_proj\.weight is not in"):
        OriginalWeights(tmp_path)("model.layers.7.mlp.up_proj")


def test_a_quantized_original_is_refused(tmp_path: Path) -> None:
    quantized_model().save_pretrained(tmp_path)
    with pytest.raises(AdapterError, match="is quantized"):
        OriginalWeights(tmp_path)("model.layers.0.mlp.up_proj")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no 16-bit weights"):
        OriginalWeights(tmp_path)
