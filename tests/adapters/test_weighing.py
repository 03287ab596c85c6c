from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from fourfold.adapters.weighing import weighed_parameters


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear, self.head = nn.Embedding(7, 6), nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.linear(self.embedding(ids)))


def adapted(**keys: object):
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["embedding", "linear"], init_lora_weights=False, **keys)
    return get_peft_model(Model(), config)


def test_weighed_is_what_a_model_with_adapters_adds_to_each_layer() -> None:
    model = adapted(lora_bias=False)
    layers = [model.base_model.model.linear, model.base_model.model.embedding]
    before = [layer.get_delta_weight("default").clone() for layer in layers]
    with torch.no_grad():
        for parameter in weighed_parameters(model):
            parameter.mul_(0.25)
    for layer, delta in zip(layers, before, strict=True):
        torch.testing.assert_close(layer.get_delta_weight("default"), 0.25 * delta, rtol=1e-6, atol=0)


def test_the_bias_of_b_is_weighed_with_it() -> None:
    torch.manual_seed(0)
    model = get_peft_model(Model(), LoraConfig(r=2, target_modules=["linear"], lora_bias=True, init_lora_weights=False))
    linear = model.base_model.model.linear
    x = torch.randn(4, 6)
    added = linear(x) - linear.base_layer(x)
    with torch.no_grad():
        for parameter in weighed_parameters(model):
            parameter.mul_(0.25)
    torch.testing.assert_close(linear(x) - linear.base_layer(x), 0.25 * added, rtol=1e-5, atol=1e-6)


def test_an_adapter_that_is_not_trained_is_left_as_it_is() -> None:
    model = adapted()
    model.add_adapter("other", LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    weighed = [names[id(parameter)] for parameter in weighed_parameters(model)]
    assert weighed == [
        "base_model.model.embedding.lora_embedding_B.default",
        "base_model.model.linear.lora_B.default.weight",
    ]
