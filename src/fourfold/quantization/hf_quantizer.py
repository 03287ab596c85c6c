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

from fourfold.errors import CheckpointError, FourfoldError, QuantizationError
from fourfold.quantization.experts import expert_parameters, is_parametrized, set_quantized_parameter
from fourfold.quantization.formats import get_format
from fourfold.quantization.hf_config import QUANT_METHOD, FourfoldConfig
from fourfold.quantization.layout import STATE_SUFFIXES, from_state_dict
from fourfold.quantization.linear import QuantizedLinear
from fourfold.quantization.selection import matches, unmatched
from fourfold.quantization.tensor import QuantizedTensor, quantize

__all__ = ["FourfoldQuantizer", "base_state_dict", "quantize_model"]


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
        self._expert_dtypes: dict[str, torch.dtype] = {}

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
        return name == "weight" and isinstance(model.get_submodule(path), QuantizedLinear)

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        config = self.quantization_config
        skipped = _skip_patterns(model, config, self.pre_quantized)
        for name, linear in list(_linears(model)):
            if matches(name, skipped):
                continue
            layer = _empty_layer(linear, config)
            if not self.pre_quantized:
                # Until the weight comes, its dtype stands for what the checkpoint is read in (Transformers < 5.18).
                layer.weight = nn.Parameter(linear.weight, requires_grad=False)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer)
        self._experts = _expert_parameters(model, skipped)
        self._expert_dtypes = {name: model.get_parameter(name).dtype for name in self._experts}
        config.has_quantized_experts = bool(self._experts)
        config.modules_to_not_convert = _left_dense(model, self._experts)
        return model

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeOnLoad(self)

    def get_weight_conversions(self) -> list[WeightConverter]:
        if not self.pre_quantized:
            return []
        # In 3-D experts the parameter itself carries the suffixes, in linear layers the parameter called "weight".
        names = ["weight", *sorted({".".join(name.split(".")[-2:]) for name in self._experts})]
        return [
            WeightConverter(
                source_patterns=[f"{name}.{suffix}" for suffix in STATE_SUFFIXES] + [name],
                target_patterns=name,
                operations=[_ReadQuantized(self, name)],
            )
            for name in names
        ]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        if self.errors:
            raise self.errors[0]
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
        if not any(".base_layer." in name or ".original_module." in name for name, _ in model.named_parameters()):
            return None, {}
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # adapters by Transformers' own integration: there the adapters are what is saved
        return base_state_dict(model), {}

    def _unread(self, model: nn.Module) -> Iterator[str]:
        """Names of quantized weights, and of biases beside them, that the checkpoint did not have."""
        for name, module in model.named_modules():
            if isinstance(module, QuantizedLinear):
                if module.scales is None:
                    yield f"{name}.weight"
                if module.bias is not None and not getattr(module.bias, "_is_hf_initialized", False):
                    yield f"{name}.bias"
        yield from (name for name in self._experts if name not in self.expert_tensors)

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for name, module in list(model.named_modules()):
            if isinstance(module, QuantizedLinear):
                parent, _, child = name.rpartition(".")
                setattr(model.get_submodule(parent), child, module.dense(dtype))
            for parameter in list(getattr(module, "parametrizations", {})):
                if is_parametrized(module, parameter):
                    dense = getattr(module, parameter).to(dtype)
                    nn.utils.parametrize.remove_parametrizations(module, parameter, leave_parametrized=False)
                    setattr(module, parameter, nn.Parameter(dense))
        return model

    def place(self, model: nn.Module, full_name: str, tensor: QuantizedTensor) -> Tensor:
        """Keep the scales of a tensor that has been read, and return the codes, which Transformers sets."""
        path, _, _ = full_name.rpartition(".")
        module = model.get_submodule(path)
        module._is_hf_initialized = True  # type: ignore[assignment]
        if full_name in self._experts:
            self.expert_tensors[full_name] = tensor
        elif isinstance(module, QuantizedLinear):
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
        entries = {
            full_layer_name + key.removeprefix(self.name): value[0] if isinstance(value, list) else value
            for key, value in input_dict.items()
        }
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
            tensor = from_state_dict(entries, full_layer_name)
        except CheckpointError as error:
            self.hf_quantizer.errors.append(error)
            return {self.name: torch.zeros(1, dtype=torch.uint8)}
        return {self.name: self.hf_quantizer.place(model, full_layer_name, tensor)}


def base_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a base that PEFT has put adapters into: under its own names, without the adapters' entries."""
    return {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): value
        for name, value in model.state_dict().items()
        if ".lora_" not in name and ".modules_to_save." not in name
    }


def quantize_model(model: PreTrainedModel, config: FourfoldConfig | None = None) -> PreTrainedModel:
    """Quantize a model that is already in memory, in place, and return it.

    The 16-bit model is in memory before: where it comes from a checkpoint, `from_pretrained` with a FourfoldConfig is
    the smaller way.

    Raises:
        QuantizationError: As for `quantize`, and 3-D parameters that are not known to be experts.
    """
    config = copy.deepcopy(config) if config is not None else FourfoldConfig()
    skipped = _skip_patterns(model, config)
    for name, linear in list(_linears(model)):
        if matches(name, skipped):
            continue
        layer = _empty_layer(linear, config)
        weight = linear.weight.data.T.contiguous() if isinstance(linear, Conv1D) else linear.weight.data
        layer.quantized = quantize(weight, name=f"{name}.weight", **config.quantize_options())
        layer.bias = linear.bias
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, layer)
    experts = _expert_parameters(model, skipped)
    for name in experts:
        path, _, parameter = name.rpartition(".")
        module = model.get_submodule(path)
        dense = getattr(module, parameter).data
        set_quantized_parameter(module, parameter, quantize(dense, name=name, **config.quantize_options()))
    config.has_quantized_experts = bool(experts)
    config.modules_to_not_convert = _left_dense(model, experts)
    if hasattr(model, "config"):
        quantizer = FourfoldQuantizer(config, pre_quantized=False)
        model.config.quantization_config = quantizer.quantization_config
        model.hf_quantizer = quantizer
        model.is_quantized = True
        if config.has_quantized_experts:
            model._weight_conversions = []
    return model


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Layers that hold a dense matrix: `nn.Linear` itself, not what derives from it, and GPT-2's transposed twin."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear or isinstance(module, Conv1D):
            yield name, module


def _empty_layer(linear: nn.Linear, config: FourfoldConfig) -> QuantizedLinear:
    is_transposed = isinstance(linear, Conv1D)
    shape = linear.weight.shape
    out_features, in_features = reversed(shape) if is_transposed else shape
    layer = QuantizedLinear(
        in_features,
        out_features,
        bias=linear.bias is not None,
        number_format=config.bnb_4bit_quant_type,
        device="meta",
        dtype=linear.weight.dtype,
    )
    layer.source_is_transposed = is_transposed  # type: ignore[assignment]
    # Codes that are missing from a checkpoint are an error: Transformers must not draw them at random.
    layer._is_hf_initialized = True  # type: ignore[assignment]
    return layer


def _left_dense(model: nn.Module, experts: list[str]) -> list[str]:
    """Full names of what was not quantized: of globs bitsandbytes would make regular expressions."""
    linears = {name for name, _ in _linears(model)}
    parameters = {f"{path}.{name}" for path, module in model.named_modules() for name in expert_parameters(module)}
    return sorted(linears | parameters - set(experts))


def _skip_patterns(model: PreTrainedModel, config: FourfoldConfig, pre_quantized: bool = False) -> list[str]:
    """Names and globs of the modules that stay as they are."""
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    # Files of others name modules of models that this one is only a part of.
    wrong = [] if pre_quantized else unmatched(names, config.modules_to_not_convert)
    if wrong:
        raise QuantizationError(
            "modules_to_not_convert names modules that the model does not have",
            found=wrong,
            allowed=sorted({name.rpartition(".")[2] for name, _ in _linears(model)}),
            hint="give a module's name, a part of its path, or a glob such as 'model.layers.0.*'",
        )
    skipped = [*config.modules_to_not_convert, *(getattr(model, "_keep_in_fp32_modules", None) or [])]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head_name = next((name for name, module in model.named_modules() if module is head), None)
    if head_name is None:
        return skipped
    if not config.quantize_lm_head:
        return [*skipped, head_name]
    if getattr(model.config, "tie_word_embeddings", False):
        if pre_quantized:
            return [*skipped, head_name]
        raise QuantizationError(
            f"{head_name} shares its weight with the embedding, which stays in 16 bits",
            found="quantize_lm_head=True",
            allowed="quantize_lm_head=False for this model",
        )
    return skipped


def _expert_parameters(model: nn.Module, skipped: list[str]) -> list[str]:
    """Names of the 3-D expert parameters; a 3-D parameter of another kind is refused rather than left."""
    known, unknown = [], []
    for path, module in model.named_modules():
        for name, parameter in expert_parameters(module).items():
            full_name = f"{path}.{name}" if path else name
            if matches(full_name, skipped):
                continue
            if "expert" in type(module).__name__.lower() or "experts" in path.split("."):
                known.append(full_name)
            else:
                unknown.append(f"{full_name} {tuple(parameter.shape)} of {type(module).__name__}")
    if unknown:
        raise QuantizationError(
            "the model has 3-D parameters that are not known to be experts",
            found=unknown[:8],
            hint="list them in modules_to_not_convert to leave them in 16 bits",
        )
    return known
