"""A model as training has it, quantized and with adapters, on the meta device: all of its operators, and no memory."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    PreTrainedModel,
)
from transformers.masking_utils import sdpa_mask

from fourfold.errors import ConfigError
from fourfold.models.families import default_target_modules
from fourfold.models.model_shape import is_target
from fourfold.models.preparing import prepare
from fourfold.quantization.experts import set_quantized_parameter
from fourfold.quantization.formats import get_format
from fourfold.quantization.hf_config import FourfoldConfig
from fourfold.quantization.scales import NESTED_BLOCK_SIZE, NestedScales, PlainScales, dynamic_map
from fourfold.quantization.selection import matches
from fourfold.quantization.swapping import (
    dense_linears,
    empty_embedding,
    empty_linear,
    expert_names,
    input_embedding,
    share_codes,
    skip_patterns,
    tied_head_of,
)
from fourfold.quantization.tensor import QuantizedTensor

__all__ = ["MetaModel", "Prefix", "decoder_layers", "meta_model"]

_ATTENTION_NAME = "fourfold_followed"


@dataclass(frozen=True)
class Prefix:
    """How a model calls its layers.

    Args:
        calls: Positional and keyword arguments behind the hidden states, of each layer.
        returns_tuples: Whether each layer returns more than the hidden states.
        num_bytes: What tensors among the arguments take: angles, masks.
        after: Modules that run behind the last layer, in order, and their names.
    """

    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    returns_tuples: list[bool]
    num_bytes: int
    after: dict[str, nn.Module]


@dataclass(frozen=True, eq=False)
class MetaModel:
    """See `meta_model`.

    Args:
        base: The causal LM.
        layers: Its decoder layers; those that are alike are one module.
        first: For each layer, the number of the first one like it.
    """

    base: PreTrainedModel
    layers: nn.ModuleList
    first: list[int]

    def modules(self) -> Iterator[tuple[nn.Module, int]]:
        """Every module, and how many there are like it."""
        many = {id(part): self.first.count(index) for index in set(self.first) for part in self.layers[index].modules()}
        for module in self.base.modules():
            yield module, many.get(id(module), 1)

    def parameters(self) -> Iterator[tuple[nn.Parameter, int]]:
        """Every parameter, and how many there are like it."""
        known: set[int] = set()
        for module, many in self.modules():
            for parameter in module.parameters(recurse=False):
                if id(parameter) not in known:
                    known.add(id(parameter))
                    yield parameter, many

    def prefix(self, batch: int, seq: int) -> Prefix:
        """Calls the model over rows, its layers but looked at."""
        decoder, tuples = self.base.base_model, dict[int, bool]()
        places = [_Place(layer, tuples) for layer in self.layers]
        inside: Any = _holder(decoder, self.layers)
        name = next(name for name, child in inside.named_children() if child is self.layers)
        after: dict[str, nn.Module] = {}

        def note(module: nn.Module, _: Any) -> None:
            if places[-1].call is not None:
                after[others[module]] = module

        others = {child: name for name, child in inside.named_children() if child is not self.layers}
        handles = [child.register_forward_pre_hook(note) for child in others]
        setattr(inside, name, nn.ModuleList(places))
        try:
            with torch.no_grad():
                ids = torch.zeros(batch, seq, dtype=torch.int64, device="meta")
                # With a cache, though empty, nothing asks position_ids, which have no values, for packed rows.
                decoder(input_ids=ids, **{_cache_name(decoder): DynamicCache()}, use_cache=False)
        finally:
            setattr(inside, name, self.layers)
            for handle in handles:
                handle.remove()
        calls = [place.call for place in places if place.call is not None]
        if len(calls) != len(places):
            raise ConfigError(f"{type(decoder).__name__} does not call all of its layers")
        storages = {id(tensor.untyped_storage()): tensor.untyped_storage() for tensor in _tensors(calls)}
        held = sum(storage.nbytes() for storage in storages.values())
        return Prefix(calls, [place.returns_tuple for place in places], held, after)


def meta_model(
    config: Any,
    quantization: FourfoldConfig | None,
    lora: LoraConfig | None,
    dtype: torch.dtype,
    attention: str | None = None,
) -> MetaModel:
    """A causal LM in training.

    Args:
        config: Transformers' configuration.
        quantization: How it is quantized; None: not at all.
        lora: Its adapter; None: all of it is trained.
        dtype: What is not quantized is held in, and computed in.
        attention: Transformers' name of the attention; "eager" holds all scores, any other none of them.

    Raises:
        ConfigError: A model whose layers are not found.
    """
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            copy.deepcopy(config), dtype=dtype, attn_implementation="eager" if attention == "eager" else None
        )
        if model.config._attn_implementation != "eager":
            AttentionInterface.register(_ATTENTION_NAME, _attend)
            AttentionMaskInterface.register(_ATTENTION_NAME, sdpa_mask)
            model.set_attn_implementation(_ATTENTION_NAME)
        layers = decoder_layers(model)
        first = _share(model, layers, quantization, lora)
        if quantization is not None:
            _quantize(model, quantization, dtype)
        if lora is None:
            model.requires_grad_(True)
        else:
            prepare(model, lora, fused=False)
        for name, module in list(model.named_modules()):
            if type(module) is nn.Dropout and module.p:
                model.set_submodule(name, _Dropout(module.p))
        return MetaModel(model.train(), layers, first)


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers. Raises ConfigError where there is no list of as many modules as there are layers."""
    count = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ConfigError(f"the layers of {type(model).__name__} are not found", found=f"num_hidden_layers: {count}")


def _share(
    model: PreTrainedModel, layers: nn.ModuleList, quantization: FourfoldConfig | None, lora: LoraConfig | None
) -> list[int]:
    """Put one module in the place of all layers that are alike; the number of the first like it, for each."""
    skipped = ["*"] if quantization is None else skip_patterns(model, quantization, False)
    targets: Any = [] if lora is None else lora.target_modules
    if targets is None:
        targets = default_target_modules(model.config.model_type)
    prefix = next(name for name, module in model.named_modules() if module is layers)
    known: dict[Any, int] = {}
    first = []
    for index, layer in enumerate(layers):
        kind = tuple(
            (
                name,
                type(module),
                *(tuple(parameter.shape) for parameter in module.parameters(recurse=False)),
                matches(f"{prefix}.{index}.{name}", skipped),
                is_target(f"{prefix}.{index}.{name}", targets),
                tuple(_settings(module)),
            )
            for name, module in layer.named_modules()
        )
        first.append(known.setdefault(kind, index))
        layers[index] = layers[first[-1]]
    return first


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a module was told of itself, such as its window, but for its number."""
    for name, value in vars(module).items():
        if isinstance(value, (str, int, float, type(None))) and name != "layer_idx":
            yield name, value


def _quantize(model: PreTrainedModel, config: FourfoldConfig, dtype: torch.dtype) -> None:
    skipped = skip_patterns(model, config, False)
    for name, linear in list(dense_linears(model)):
        if not matches(name, skipped):
            layer = empty_linear(linear, config)
            layer.quantized = _empty(torch.Size((layer.out_features, layer.in_features)), config, dtype)
            layer.bias = linear.bias
            model.set_submodule(name, layer)
    if config.quantize_embeddings:
        name, table = input_embedding(model)
        embedding = empty_embedding(table, config)
        embedding.quantized = _empty(table.weight.shape, config, dtype)
        model.set_submodule(name, embedding)
        tied_head = tied_head_of(model)
        if tied_head is not None:
            share_codes(model, tied_head)
    for name in expert_names(model, skipped, config):
        path, _, parameter = name.rpartition(".")
        module = model.get_submodule(path)
        set_quantized_parameter(module, parameter, _empty(getattr(module, parameter).shape, config, dtype))
    model.requires_grad_(False)


def _empty(shape: torch.Size, config: FourfoldConfig, dtype: torch.dtype) -> QuantizedTensor:
    number_format, block_size = get_format(config.bnb_4bit_quant_type), config.bnb_4bit_blocksize
    meta = torch.device("meta")
    if number_format.is_vectorwise:
        rows = PlainScales(torch.empty(shape[:-1].numel()))
        parts: Any = (number_format.codebook(meta), number_format, shape[-1], shape, dtype, config.llm_int8_threshold)
        return QuantizedTensor(number_format.empty_codes(shape), rows, *parts)
    num_blocks = -(-shape.numel() // block_size)
    scales: NestedScales | PlainScales = PlainScales(torch.empty(num_blocks))
    if config.bnb_4bit_use_double_quant:
        nested = torch.empty(-(-num_blocks // NESTED_BLOCK_SIZE))
        scales = NestedScales(torch.empty(num_blocks, dtype=torch.uint8), nested, torch.empty(()), dynamic_map(meta))
    codes = number_format.empty_codes(shape)
    return QuantizedTensor(codes, scales, number_format.codebook(meta), number_format, block_size, shape, dtype)


def _holder(model: nn.Module, layers: nn.ModuleList) -> nn.Module:
    return next(module for module in model.modules() if any(child is layers for child in module.children()))


def _cache_name(decoder: nn.Module) -> str:
    """What the decoder calls a key-value cache: by another name from Transformers 5.24 on."""
    return "cache" if "cache" in inspect.signature(decoder.forward).parameters else "past_key_values"


class _Place(nn.Module):
    """Stands where a layer stands, and notes how it is called.

    Args:
        layer: That layer.
        tuples: Whether layers, by their id, return tuples; shared by all places.
    """

    def __init__(self, layer: nn.Module, tuples: dict[int, bool]) -> None:
        super().__init__()
        self.layer, self.tuples = layer, tuples
        self.call: tuple[tuple[Any, ...], dict[str, Any]] | None = None

    def __getattr__(self, name: str) -> Any:
        # Models ask layers of what kind they are.
        modules = self.__dict__["_modules"]
        return modules[name] if name in modules else getattr(modules["layer"], name)

    @property
    def returns_tuple(self) -> bool:
        return self.tuples[id(self.layer)]

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        args = tuple(None if isinstance(value, Cache) else value for value in args)
        kwargs = {name: None if isinstance(value, Cache) else value for name, value in kwargs.items()}
        self.call = (args, kwargs)
        if id(self.layer) not in self.tuples:
            self.tuples[id(self.layer)] = isinstance(self.layer(hidden, *args, **kwargs), tuple)
        return (hidden,) if self.returns_tuple else hidden


class _Dropout(nn.Dropout):
    """Dropout as GPUs do it, with a mask of one byte a number; elsewhere PyTorch's keeps one in the numbers' dtype."""

    def forward(self, x: Tensor) -> Tensor:
        dropped: Tensor = torch.native_dropout(x, self.p, self.training)[0]
        return dropped


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for one in value:
            yield from _tensors(one)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


class _Attention(torch.autograd.Function):
    """What PyTorch's attention kernels for GPUs hold, which the meta device's would not: no scores, in neither pass."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        batch, heads, length, _ = q.shape
        out = torch.empty_like(q)
        lse = q.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, lse, bias)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *_ = ctx.saved_tensors
        # The gradient of q is summed in fp32; those of k and v are made for every head of q, and added up.
        sums = [torch.empty_like(q, dtype=torch.float32)]
        if k.shape[1] != q.shape[1]:
            sums += [torch.empty_like(q), torch.empty_like(q)]
        grads = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del sums
        return *grads, None


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """Transformers' attention function, with the memory of `sdpa` on a GPU."""
    bias = None
    if attention_mask is not None:
        # Kernels that take a mask want it in the dtype of q, and a k and v for each head.
        bias = attention_mask.to(query.dtype)
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    out: Tensor = _Attention.apply(query, key, value, bias)
    return out.transpose(1, 2).contiguous(), None
