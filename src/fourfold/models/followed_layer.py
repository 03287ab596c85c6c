"""Layers that take the generic path, whose memory is found by following them: the counterpart of `block_memory`."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fourfold.errors import ConfigError
from fourfold.models.block_memory import Tensors
from fourfold.models.following import Followed, follow
from fourfold.models.meta_model import MetaModel, Prefix, meta_model
from fourfold.models.model_shape import ModelShape
from fourfold.models.streaming import layer_bytes
from fourfold.quantization.experts import quantized_parameters
from fourfold.quantization.footprint import scale_parts
from fourfold.quantization.hf_config import FourfoldConfig
from fourfold.quantization.linear import QuantizedLinear, QuantizedWeight
from fourfold.quantization.scales import NestedScales
from fourfold.quantization.tensor import QuantizedTensor

__all__ = ["FollowedEnds", "FollowedLayer", "FollowedMemory", "followed_shape"]


class _Runs:
    """What was followed of a model, each once."""

    def __init__(self, model: MetaModel, hidden_size: int, dtype: torch.dtype) -> None:
        self.model, self.hidden_size, self.dtype = model, hidden_size, dtype
        self._prefixes: dict[tuple[int, int], Prefix] = {}
        self._layers: dict[tuple[int, int, int, str], FollowedMemory] = {}
        self._tails: dict[tuple[int, int], Followed] = {}

    def prefix(self, batch: int, seq: int) -> Prefix:
        if (batch, seq) not in self._prefixes:
            self._prefixes[batch, seq] = self.model.prefix(batch, seq)
        return self._prefixes[batch, seq]

    def layer(self, index: int, batch: int, seq: int, policy: str) -> FollowedMemory:
        key = (index, batch, seq, policy)
        if key not in self._layers:
            prefix, layer = self.prefix(batch, seq), self.model.layers[index]
            args, kwargs = prefix.calls[index]
            has_more = prefix.returns_tuples[index]

            def run(hidden: Tensor) -> Tensor:
                call: Any = partial(layer, **kwargs)
                if policy == "full":
                    call = partial(checkpoint, call, use_reentrant=False, preserve_rng_state=False)
                out: Any = call(hidden, *args)
                result: Tensor = out[0] if has_more else out
                return result

            self._layers[key] = FollowedMemory(follow(layer, run, self._hidden(batch, seq)))
        return self._layers[key]

    def tail(self, batch: int, seq: int) -> Followed:
        if (batch, seq) not in self._tails:
            after = nn.Sequential(OrderedDict(self.prefix(batch, seq).after))
            self._tails[batch, seq] = follow(after, after, self._hidden(batch, seq))
        return self._tails[batch, seq]

    def _hidden(self, batch: int, seq: int) -> Tensor:
        return torch.empty(batch, seq, self.hidden_size, dtype=self.dtype, device="meta")


@dataclass(frozen=True, eq=False)
class FollowedMemory:
    """One layer's tensors for a microbatch under one policy, with the methods of `BlockMemory`."""

    followed: Followed

    def kept(self) -> Tensors:
        """What waits for the backward pass."""
        return self.followed.forward.after

    def offloaded(self) -> Tensors:
        """Nothing: only fused blocks have a place in host memory."""
        return {}

    def host_bytes(self) -> int:
        return 0

    def forward_moments(self) -> list[Tensors]:
        """The highest moment of the forward pass."""
        return [self.followed.forward.peak]

    def backward_moments(self) -> list[Tensors]:
        """The highest moment of the backward pass, what is computed again included."""
        return [self.followed.backward.peak]


@dataclass(frozen=True)
class FollowedLayer:
    """A decoder layer on the generic path.

    Args:
        runs: What was followed.
        index: Of the first layer that is like this one.
        gradient_bytes: Of what it trains.
        weight_bytes: Of the base's weights in it that are not quantized.
        features, head_dim: Of its attention, as the model's configuration has them.
    """

    runs: _Runs
    index: int
    gradient_bytes: int
    weight_bytes: int
    features: int
    head_dim: int

    def memory(self, batch: int, seq: int, policy: str) -> FollowedMemory:
        return self.runs.layer(self.index, batch, seq, policy)


@dataclass(frozen=True)
class FollowedEnds:
    """What of a model is before and behind its layers."""

    runs: _Runs

    def around(self, batch: int, seq: int) -> int:
        """Bytes that all layers are called with: angles, masks."""
        return self.runs.prefix(batch, seq).num_bytes

    def tail(self, batch: int, seq: int) -> Followed:
        """The last norm."""
        return self.runs.tail(batch, seq)


def followed_shape(
    config: Any,
    quantization: FourfoldConfig | None,
    lora: LoraConfig | None,
    dtype: torch.dtype = torch.bfloat16,
    attention: str | None = None,
) -> ModelShape:
    """The shape of a causal LM whose layers take the generic path.

    Args are those of `meta_model`.

    Raises:
        ConfigError: The model's layers do not run without data, or are not found.
    """
    model = meta_model(config, quantization, lora, dtype, attention)
    base = model.base
    head, embedding = base.get_output_embeddings(), base.get_input_embeddings()
    runs = _Runs(model, head.in_features, dtype)
    try:
        for index in sorted(set(model.first)):
            runs.layer(index, 1, 16, "none")
    except (RuntimeError, TypeError) as error:
        raise ConfigError(
            f"layers of {type(base).__name__} do not run without data, which planning has none of",
            found=str(error).splitlines()[0],
        ) from error
    text = base.config.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or head.in_features // heads
    held = list(model.parameters())
    trained = [(one, many) for one, many in held if one.requires_grad]
    dense = [(one, many) for one, many in held if one.is_floating_point() and (lora is None or not one.requires_grad)]
    is_tied = embedding.weight is head.weight
    # A head that shares the embedding's codes is counted once.
    counted = [(module, many) for module, many in model.modules() if not (is_tied and module is head)]
    weights = [(weight, many) for module, many in counted for weight in _quantized(module)]
    in_base = {id(one) for one, _ in dense}
    num_quantized = sum(weight.num_elements * many for weight, many in weights)
    trained_bytes = sum(one.nbytes * many for one, many in trained)
    return ModelShape(
        num_parameters=num_quantized + sum(one.numel() * many for one, many in dense),
        num_quantized=num_quantized,
        code_bytes=sum(weight.codes.nbytes * many for weight, many in weights),
        scale_bytes=sum(weight.scales.num_bytes * many for weight, many in weights),
        dense_bytes=sum(one.nbytes * many for one, many in dense),
        adapter_shapes=tuple(tuple(one.shape) for one, many in trained for _ in range(many)),
        adapter_bytes=0 if lora is None else trained_bytes,
        gradient_bytes=trained_bytes,
        blocks=tuple(
            FollowedLayer(
                runs,
                index,
                _gradient_bytes(model.layers[index]),
                sum(one.nbytes for one in model.layers[index].parameters() if id(one) in in_base),
                heads * head_dim,
                head_dim,
            )
            for index in model.first
        ),
        layer_bytes=tuple(_streamed_bytes(layer) for layer in model.layers) if weights else (),
        layer_codes=tuple(_code_bytes(layer) for layer in model.layers) if weights else (),
        vocab_size=head.out_features,
        hidden_size=head.in_features,
        head_is_quantized=isinstance(head, QuantizedLinear),
        is_fused=False,
        element_size=dtype.itemsize,
        head_gradient_bytes=_gradient_bytes(head),
        embedding_gradient_bytes=_gradient_bytes(embedding),
        is_tied=is_tied,
        ends=FollowedEnds(runs),
    )


def _gradient_bytes(module: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in module.parameters() if parameter.requires_grad)


def _quantized(module: nn.Module) -> list[QuantizedTensor]:
    own = [module.quantized] if isinstance(module, QuantizedWeight) else []
    return own + list(quantized_parameters(module).values())


def _streamed_bytes(layer: nn.Module) -> int:
    """Of a layer's quantized linears as they stream."""
    sizes: list[int] = []
    for module in layer.modules():
        if isinstance(module, QuantizedLinear):
            weight = module.quantized
            sizes.append(weight.codes.nbytes)
            sizes += scale_parts(weight.num_elements, weight.block_size, isinstance(weight.scales, NestedScales))
    return layer_bytes(sizes)


def _code_bytes(layer: nn.Module) -> int:
    """Of these linears, the codes."""
    return sum(module.quantized.codes.nbytes for module in layer.modules() if isinstance(module, QuantizedLinear))
