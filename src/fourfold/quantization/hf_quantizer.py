"""The Transformers quantizer: a model becomes 4-bit tensor by tensor while `from_pretrained` reads it.

Linear layers are replaced by QuantizedLinear on the meta device; then each weight is read, quantized where it arrives,
and let go before the next is read, so that no moment holds the 16-bit model.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from fourfold.errors import CheckpointError, FourfoldError
from fourfold.quantization.embedding import QuantizedEmbedding
from fourfold.quantization.experts import is_parametrized, set_quantized_parameter
from fourfold.quantization.formats import get_format
from fourfold.quantization.hf_config import QUANT_METHOD, FourfoldConfig
from fourfold.quantization.layout import STATE_SUFFIXES, VECTORWISE_SUFFIXES, from_state_dict
from fourfold.quantization.linear import QuantizedLinear, QuantizedWeight
from fourfold.quantization.selection import matches
from fourfold.quantization.swapping import (
    base_state_dict,
    dense_linears,
    empty_embedding,
    empty_linear,
    expert_names,
    input_embedding,
    left_dense,
    share_codes,
    skip_patterns,
    tied_head_of,
)
from fourfold.quantization.tensor import QuantizedTensor, quantize

__all__ = ["FourfoldQuantizer", "quantize_model"]


@register_quantizer(QUANT_METHOD)
class FourfoldQuantizer(HfQuantizer):
    """Quantizes a 16-bit checkpoint while it loads, or loads one that is quantized in our or bitsandbytes' layout."""

    requires_calibration = False
    quantization_config: FourfoldConfig

    def __init__(self, quantization_config: FourfoldConfig, **kwargs: Any) -> None:
        # A copy: what is found out about one model must not follow the caller's object to the next.
        super().__init__(copy.deepcopy(quantization_config), **kwargs)
        self.expert_tensors: dict[str, QuantizedTensor] = {}
        # Transformers turns an exception during loading into a line of its report; kept here, it is raised as it is.
        self.errors: list[FourfoldError] = []
        # Names of the 3-D parameters that are quantized, and the dtypes that the model computes in there.
        self._experts: list[str] = []
        # Name of an output head whose codes are the embedding's.
        self.tied_head: str | None = None
        self._expert_dtypes: dict[str, torch.dtype] = {}
        # Of the parameters that stay dense.
        self._dense_shapes: dict[str, torch.Size] = {}

    @property
    def is_trainable(self) -> bool:
        return True

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        return True

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        # Transformers warms the GPU's allocator up with this size: the 16-bit one would be the 16-bit model's peak.
        if not self.pre_quantized and self.param_needs_quantization(model, param_name):
            return get_format(self.quantization_config.bnb_4bit_quant_type).bits / 8
        return param.element_size()

    def update_device_map(self, device_map: Any) -> Any:
        if device_map is None and torch.cuda.is_available():
            return {"": torch.cuda.current_device()}
        return device_map

    def param_needs_quantization(self, model: nn.Module, param_name: str, **kwargs: Any) -> bool:
        if param_name in self._experts:
            return True
        path, _, name = param_name.rpartition(".")
        return name == "weight" and isinstance(model.get_submodule(path), QuantizedWeight)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config
        skipped = skip_patterns(model, config, self.pre_quantized)
        for name, linear in list(dense_linears(model)):
            if matches(name, skipped):
                continue
            self._replace(model, name, linear, empty_linear(linear, config))
        if config.quantize_embeddings:
            name, table = input_embedding(model)
            self._replace(model, name, table, empty_embedding(table, config))
            self.tied_head = tied_head_of(model)
        self._experts = expert_names(model, skipped, config)
        self._expert_dtypes = {name: model.get_parameter(name).dtype for name in self._experts}
        config.has_quantized_experts = bool(self._experts)
        config.modules_to_not_convert = left_dense(model, self._experts)
        quantized = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, QuantizedWeight)}
        self._dense_shapes = {
            name: parameter.shape
            for name, parameter in model.named_parameters()
            if name not in quantized and name not in self._experts
        }
        return model

    def _replace(self, model: nn.Module, name: str, dense: nn.Linear | nn.Embedding, layer: nn.Module) -> None:
        if not self.pre_quantized:
            # Until the weight comes, its dtype stands for what the checkpoint is read in (Transformers < 5.18).
            layer.weight = nn.Parameter(dense.weight, requires_grad=False)
        model.set_submodule(name, layer)

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeOnLoad(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        if not self.pre_quantized:
            return []
        # In 3-D experts the parameter itself carries the suffixes, in linear layers the parameter called "weight".
        own = VECTORWISE_SUFFIXES if self.quantization_config.load_in_8bit else ()
        names = ["weight", *sorted({".".join(name.split(".")[-2:]) for name in self._experts})]
        return [
            WeightConverter(
                source_patterns=[*(f"{name}.{suffix}" for suffix in STATE_SUFFIXES), *own, name],
                target_patterns=name,
                operations=[_ReadQuantized(self, name)],
            )
            for name in names
        ]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.errors:
            raise self.errors[0]
        self._check_dense_shapes(model)
        if self.tied_head is not None:
            share_codes(model, self.tied_head)
        unread = list(self._unread(model))
        if unread:
            raise CheckpointError(
                "weights are missing from the checkpoint",
                found=", ".join(unread[:8]) + (f" and {len(unread) - 8} more" if len(unread) > 8 else ""),
                hint="it was half written, or belongs to another model: get it again",
            )
        for name, tensor in self.expert_tensors.items():
            path, _, parameter = name.rpartition(".")
            module = model.get_submodule(path)
            device = getattr(module, parameter).device
            set_quantized_parameter(module, parameter, tensor.to(device), self._expert_dtypes[name])
        if self.expert_tensors or self.pre_quantized:
            # A checkpoint of this model is written in the model's own names: Transformers' conversions would split
            # packed codes as if they were weights.
            model._weight_conversions = []
        self.expert_tensors = {}
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        """A base that PEFT has put adapters into is saved under its own names, without their entries."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # adapters by Transformers' own integration: there the adapters are what is saved
        return base_state_dict(model, self.tied_head), {}

    def _check_dense_shapes(self, model: nn.Module) -> None:
        """Transformers 5.17 compares no shapes where there is a quantizer."""
        found = {name: model.get_parameter(name).shape for name in self._dense_shapes}
        wrong = [
            f"{name}: {tuple(found[name])}, not {tuple(wanted)}"
            for name, wanted in self._dense_shapes.items()
            if found[name] != wanted
        ]
        if wrong:
            raise CheckpointError(
                "weights do not have the shapes of the model's config.json",
                found="; ".join(wrong[:4]),
                hint="config.json and the weights do not belong together: get the checkpoint again",
            )

    def _unread(self, model: nn.Module) -> Iterator[str]:
        """Names of quantized weights, and of biases beside them, that the checkpoint did not have."""
        for name, module in model.named_modules():
            if isinstance(module, QuantizedWeight) and module.scales is None:
                yield f"{name}.weight"
            bias = module.bias if isinstance(module, QuantizedLinear) else None
            if bias is not None and not getattr(bias, "_is_hf_initialized", False):
                yield f"{name}.bias"
        yield from (name for name in self._experts if name not in self.expert_tensors)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantizedLinear | QuantizedEmbedding):
                model.set_submodule(name, module.dense(dtype))
            for parameter in list(getattr(module, "parametrizations", {})):
                if is_parametrized(module, parameter):
                    dense = getattr(module, parameter).to(dtype)
                    nn.utils.parametrize.remove_parametrizations(module, parameter, leave_parametrized=False)
                    setattr(module, parameter, nn.Parameter(dense))
        if self.tied_head is not None:
            model.get_submodule(self.tied_head).weight = model.get_input_embeddings().weight
        return model

    def place(self, model: nn.Module, full_name: str, tensor: QuantizedTensor) -> Tensor:
        """Keep the scales of a tensor that has been read, and return the codes, which Transformers sets."""
        path, _, _ = full_name.rpartition(".")
        module = model.get_submodule(path)
        module._is_hf_initialized = True  # type: ignore[assignment]
        if full_name in self._experts:
            self.expert_tensors[full_name] = tensor
        elif isinstance(module, QuantizedWeight):
            module.set_scales(tensor)
        return nn.Parameter(tensor.codes, requires_grad=False)


class _QuantizeOnLoad(ConversionOps):
    """A dense tensor becomes codes."""

    def __init__(self, quantizer: FourfoldQuantizer) -> None:
        self.quantizer = quantizer

    def convert(self, input_dict: dict[str, Any], model: nn.Module | None = None, **kwargs: Any) -> dict[str, Tensor]:
        assert model is not None
        result = {}
        for name, value in input_dict.items():
            dense = value[0] if isinstance(value, list) else value
            module = model.get_submodule(name.rpartition(".")[0])
            if getattr(module, "source_is_transposed", False):
                dense = dense.T.contiguous()
            try:
                quantized = quantize(dense, name=name, **self.quantizer.quantization_config.quantize_options())
            except FourfoldError as error:
                self.quantizer.errors.append(error)
                quantized = quantize(torch.zeros_like(dense), name=name)
            result[name] = self.quantizer.place(model, name, quantized)
        return result


class _ReadQuantized(ConversionOps):
    """The entries of one quantized tensor become its codes; any other tensor passes through."""

    def __init__(self, quantizer: FourfoldQuantizer, name: str) -> None:
        # Transformers reads tensors in the checkpoint's own dtypes for operations that have an attribute of this name.
        self.hf_quantizer = quantizer
        self.name = name

    def __deepcopy__(self, memo: dict[int, Any]) -> _ReadQuantized:
        # Transformers copies an operation for each weight; what is read must reach the one quantizer.
        return self

    def convert(
        self,
        input_dict: dict[str, Any],
        model: nn.Module | None = None,
        full_layer_name: str | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        assert model is not None
        assert full_layer_name is not None
        path = full_layer_name.removesuffix(self.name)
        entries = {path + key: value[0] if isinstance(value, list) else value for key, value in input_dict.items()}
        expected = self.hf_quantizer.param_needs_quantization(model, full_layer_name)
        if not expected and len(entries) == 1:
            dtype = model.get_parameter_or_buffer(full_layer_name).dtype  # type: ignore[operator]
            return {self.name: entries[full_layer_name].to(dtype)}
        try:
            if not expected:
                raise CheckpointError(
                    f"{full_layer_name} is quantized in the checkpoint but is listed among the modules that are not",
                    found=sorted(entries),
                    hint="config.json and the weights do not belong together: get the checkpoint again",
                )
            threshold = self.hf_quantizer.quantization_config.llm_int8_threshold
            tensor = from_state_dict(entries, full_layer_name, threshold)
        except CheckpointError as error:
            self.hf_quantizer.errors.append(error)
            return {self.name: torch.zeros(1, dtype=torch.uint8)}
        return {self.name: self.hf_quantizer.place(model, full_layer_name, tensor)}


def quantize_model(model: PreTrainedModel, config: FourfoldConfig | None = None) -> PreTrainedModel:
    """Quantize a model that is already in memory, in place, and return it.

    The 16-bit model is in memory before: where it comes from a checkpoint, `from_pretrained` with a FourfoldConfig is
    the smaller way.

    Raises:
        QuantizationError: As for `quantize`, and 3-D parameters that are not known to be experts.
    """
    config = copy.deepcopy(config) if config is not None else FourfoldConfig()
    skipped = skip_patterns(model, config)
    for name, linear in list(dense_linears(model)):
        if matches(name, skipped):
            continue
        layer = empty_linear(linear, config)
        weight = linear.weight.data.T.contiguous() if isinstance(linear, Conv1D) else linear.weight.data
        layer.quantized = quantize(weight, name=f"{name}.weight", **config.quantize_options())
        layer.bias = linear.bias
        model.set_submodule(name, layer)
    tied_head = None
    if config.quantize_embeddings:
        name, table = input_embedding(model)
        embedding = empty_embedding(table, config)
        embedding.quantized = quantize(table.weight.data, name=f"{name}.weight", **config.quantize_options())
        model.set_submodule(name, embedding)
        tied_head = tied_head_of(model)
        if tied_head is not None:
            share_codes(model, tied_head)
    experts = expert_names(model, skipped, config)
    for name in experts:
        path, _, parameter = name.rpartition(".")
        module = model.get_submodule(path)
        dense = getattr(module, parameter).data
        set_quantized_parameter(module, parameter, quantize(dense, name=name, **config.quantize_options()))
    config.has_quantized_experts = bool(experts)
    config.modules_to_not_convert = left_dense(model, experts)
    if hasattr(model, "config"):
        quantizer = FourfoldQuantizer(config, pre_quantized=False)
        quantizer.tied_head = tied_head
        model.config.quantization_config = quantizer.quantization_config
        model.hf_quantizer = quantizer
        model.is_quantized = True
        if config.has_quantized_experts:
            model._weight_conversions = []
    return model
