from __future__ import annotations

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from small_models import small_model
from transformers import DynamicCache

from fourfold.errors import InferenceError
from fourfold.inference.cache import CacheShape, LayerShape, SlotCache, bucket
from fourfold.inference.generic_step import GenericStep, cache_shape

SHAPE = CacheShape((LayerShape(2, 8, 6), None, LayerShape(1, 4, 4, window=5)), torch.bfloat16)


def held_bytes(cache: SlotCache) -> int:
    return sum(tensor.nbytes for tensor in (*cache.keys, *cache.values) if tensor is not None)


def test_the_formula_gives_the_bytes_that_the_cache_takes() -> None:
    cache = SlotCache(SHAPE, 3, 100, first_bucket=16)
    assert cache.num_bytes == SHAPE.num_bytes(3, 16) == held_bytes(cache)
    cache.ensure(65)
    assert cache.length == 100
    assert cache.num_bytes == SHAPE.num_bytes(3, 100) == held_bytes(cache)


def test_lengths_double_up_to_the_largest() -> None:
    assert [bucket(length, 3000) for length in (1, 512, 513, 1024, 1025, 2500)] == [512, 512, 1024, 1024, 2048, 3000]


def test_growing_keeps_what_is_there_and_makes_new_tensors() -> None:
    cache = SlotCache(SHAPE, 2, 64, first_bucket=8)
    before = []
    for tensor in (*cache.keys, *cache.values):
        if tensor is not None:
            tensor.copy_(torch.randn(tensor.shape))
            before.append(tensor.clone())
    version = cache.version
    cache.ensure(9)
    assert cache.version > version
    after = [tensor for tensor in (*cache.keys, *cache.values) if tensor is not None]
    for old, new in zip(before, after, strict=True):
        assert torch.equal(new[:, :, :8], old)
        assert not new[:, :, 8:].any()
    version = cache.version
    cache.ensure(16)
    assert cache.version == version


def test_a_cache_that_ran_out_of_memory_while_growing_grows_later(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = SlotCache(SHAPE, 2, 64, first_bucket=8)
    assert cache.keys[0] is not None
    cache.keys[0].fill_(3)
    make, left = cache._empty, [2]

    def short(*sizes: int) -> torch.Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError
        return make(*sizes)

    monkeypatch.setattr(cache, "_empty", short)
    with pytest.raises(torch.OutOfMemoryError):
        cache.ensure(20)
    assert cache.length == 8
    left[0] = 10
    cache.ensure(20)
    assert cache.length == 32
    assert (cache.keys[0][:, :, :8] == 3).all()
    assert held_bytes(cache) == SHAPE.num_bytes(2, 32)


def test_more_than_the_largest_length_is_refused() -> None:
    with pytest.raises(InferenceError, match="up to 64"):
        SlotCache(SHAPE, 2, 64).ensure(65)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_the_shape_is_that_of_transformers_own_cache(family: str) -> None:
    model = small_model(family)
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.zeros(1, 5, dtype=torch.int64), past_key_values=cache)
    shape = cache_shape(model)
    theirs = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert shape.num_bytes(1, 5) == theirs
    assert [layer.window for layer in shape.layers if layer] == [
        getattr(layer, "sliding_window", None) for layer in cache.layers
    ]


@pytest.mark.parametrize(
    ("family", "reason"), [("mamba", "a recurrent state"), ("lfm2", "LinearAttentionLayer|keeps nothing")]
)
def test_models_that_keep_something_else_are_refused_with_the_reason(family: str, reason: str) -> None:
    kinds = {"layer_types": ["conv", "full_attention", "conv"]} if family == "lfm2" else {}
    with pytest.raises(InferenceError, match=reason):
        GenericStep(small_model(family, **kinds))


def test_adapters_of_virtual_tokens_are_refused() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    with pytest.raises(InferenceError, match="virtual tokens"):
        GenericStep(get_peft_model(small_model(), config))
