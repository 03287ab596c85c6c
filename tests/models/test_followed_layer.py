"""Layers that are followed on the meta device, against real ones and against what is known of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from decoders import SIZES
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, MixtralConfig, Qwen3MoeConfig

from fourfold.models.followed_layer import FollowedLayer, followed_shape
from fourfold.models.model_shape import model_shape
from fourfold.quantization.hf_config import FourfoldConfig

BATCH, SEQ = 2, 32


def layer_of(shape: Any, index: int = 0) -> FollowedLayer:
    layer = shape.blocks[index]
    assert isinstance(layer, FollowedLayer)
    return layer


def held(layer: FollowedLayer, policy: str = "none", seq: int = SEQ) -> int:
    return sum(layer.memory(BATCH, seq, policy).kept().values())


def test_weights_are_those_that_are_counted_for_fused_blocks() -> None:
    config = LlamaConfig(**SIZES)
    fused = model_shape(config, FourfoldConfig(), 4)
    followed = followed_shape(config, FourfoldConfig(), LoraConfig(r=4, task_type="CAUSAL_LM"))
    for name in ("num_parameters", "num_quantized", "code_bytes", "scale_bytes", "dense_bytes", "adapter_bytes"):
        assert getattr(followed, name) == getattr(fused, name), name
    assert followed.layer_bytes == fused.layer_bytes
    assert sorted(followed.adapter_shapes) == sorted(fused.adapter_shapes)


def test_kept_bytes_are_those_of_tensors_that_autograd_saves_in_a_real_layer() -> None:
    config = LlamaConfig(**{**SIZES, "num_key_value_heads": 4})
    base = AutoModelForCausalLM.from_config(config, dtype=torch.float32).train()
    hidden = torch.randn(BATCH, SEQ, SIZES["hidden_size"]).requires_grad_() * 1.0
    angles = base.model.rotary_emb(hidden, torch.arange(SEQ)[None])
    outside = {value.untyped_storage().data_ptr() for value in [*base.parameters(), *angles]}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in outside:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = base.model.layers[0](hidden, position_embeddings=angles)
    assert out.requires_grad
    found = held(layer_of(followed_shape(config, None, None, torch.float32)))
    assert abs(found / sum(saved.values()) - 1) < 0.01


def test_memory_grows_with_tokens_and_no_faster_without_scores() -> None:
    layer = layer_of(followed_shape(LlamaConfig(**SIZES), None, None))
    assert held(layer, seq=64) == 2 * held(layer, seq=32)
    eager = layer_of(followed_shape(LlamaConfig(**SIZES), None, None, attention="eager"))
    assert held(eager, seq=64) > 2.2 * held(eager, seq=32)


def test_layers_that_are_alike_are_followed_once_and_others_by_themselves() -> None:
    config = Gemma3TextConfig(**{**SIZES, "num_hidden_layers": 6}, sliding_window=8)
    shape = followed_shape(config, None, LoraConfig(r=4, target_modules=r".*\.4\.mlp\.up_proj", task_type="CAUSAL_LM"))
    kinds = [layer_of(shape, index).index for index in range(6)]
    # Five with a window, of which one has the adapter, and one without.
    assert kinds == [0, 0, 0, 0, 4, 5]
    assert [block.gradient_bytes > 0 for block in shape.blocks] == [False] * 4 + [True, False]
    # A window is a dense mask to PyTorch's attention.
    assert held(layer_of(shape, 0)) != held(layer_of(shape, 5))


def test_dropout_keeps_a_byte_a_number_and_dora_a_dense_weight() -> None:
    config = LlamaConfig(**SIZES)

    def kept(**options: Any) -> int:
        lora = LoraConfig(r=4, target_modules=["down_proj"], task_type="CAUSAL_LM", **options)
        return held(layer_of(followed_shape(config, FourfoldConfig(), lora)))

    wide = BATCH * SEQ * SIZES["intermediate_size"]
    # What is left is kept, for the gradient of A, in the place of what it is left of.
    assert kept(lora_dropout=0.5) - kept() == wide
    assert kept(use_dora=True) > kept()


@pytest.mark.parametrize("config", [MixtralConfig, Qwen3MoeConfig])
def test_mixtures_of_experts_are_followed(config: Any) -> None:
    sizes = {**SIZES, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    experts = {"num_local_experts": 4} if config is MixtralConfig else {"num_experts": 4}
    shape = followed_shape(config(**sizes, **experts), FourfoldConfig(), LoraConfig(r=4, task_type="CAUSAL_LM"))
    assert shape.num_quantized > 0.5 * shape.num_parameters
    assert held(layer_of(shape), "full") < held(layer_of(shape))
