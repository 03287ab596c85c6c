"""The weights of a trained model with its adapter merged in, one at a time.

A merged model need not be in memory as a whole: each weight is dequantized, summed with its adapter in fp32 and let go
again when it has been written.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from transformers import PreTrainedModel

from fourfold.errors import AdapterError, ConfigError
from fourfold.models.underlying import underlying
from fourfold.quantization.embedding import QuantizedEmbedding
from fourfold.quantization.linear import QuantizedLinear

__all__ = ["MergedTensor", "merged_tensors"]


@dataclass(frozen=True)
class MergedTensor:
    """A weight of the merged model.

    Args:
        name: As in the base model's state dict.
        shape: Its shape.
        read: Computes it: fp32 where the base is loaded in fp32, on the CPU.
    """

    name: str
    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def merged_tensors(model: PeftModel | PreTrainedModel) -> list[MergedTensor]:
    """All weights of the merged model, in the order of its modules; a head that is tied to the embedding is left out.

    Args:
        model: A base, quantized or not, with its adapter or without one; it stays as it is.

    Raises:
        AdapterError: An adapter on an embedding that the output head shares, which is no longer shared then.
        ConfigError: Experts held as one 3-D parameter.
    """
    base = underlying(model)
    skipped = None
    if getattr(base.config, "tie_word_embeddings", False):
        shared = (base.get_input_embeddings(), base.get_output_embeddings())
        if any(isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper) for module in shared):
            raise AdapterError(
                "the output head and the embedding share their weight, and the adapter changed one of them",
                hint="fourfold merge writes such a model",
            )
        skipped = shared[1]
    return list(_visit(base, "", skipped))


def _visit(module: nn.Module, path: str, skipped: nn.Module | None) -> Iterator[MergedTensor]:
    if module is skipped:
        return
    if isinstance(module, BaseTunerLayer):
        yield from _of_adapted(module, path)
        return
    if isinstance(module, AuxiliaryTrainingWrapper):
        (active,) = module.active_adapters
        yield from _visit(module.modules_to_save[active], path, skipped)
        return
    if is_parametrized(module):
        raise ConfigError(
            f"{path} holds quantized experts, which are merged as a whole model",
            hint="fourfold merge writes such a model",
        )
    if isinstance(module, QuantizedLinear | QuantizedEmbedding):
        yield MergedTensor(f"{path}.weight", tuple(module.quantized.shape), partial(_dequantized, module))
        bias = getattr(module, "bias", None)
        if bias is not None:
            yield _of_parameter(f"{path}.bias", bias)
        return
    for name, parameter in module.named_parameters(recurse=False):
        yield _of_parameter(f"{path}.{name}", parameter)
    for name, child in module.named_children():
        yield from _visit(child, f"{path}.{name}".lstrip("."), skipped)


def _of_parameter(name: str, parameter: Tensor) -> MergedTensor:
    return MergedTensor(name, tuple(parameter.shape), lambda: parameter.detach().cpu())


def _of_adapted(layer: BaseTunerLayer, path: str) -> Iterator[MergedTensor]:
    base = layer.get_base_layer()
    shape = base.quantized.shape if isinstance(base, QuantizedLinear) else base.weight.shape
    yield MergedTensor(f"{path}.weight", tuple(shape), partial(_merged, layer, "weight"))
    has_bias = any(up.bias is not None for up in getattr(layer, "lora_B", {}).values())
    if has_bias:
        yield MergedTensor(f"{path}.bias", (base.weight.shape[0],), partial(_merged, layer, "bias"))
    elif getattr(base, "bias", None) is not None:
        yield _of_parameter(f"{path}.bias", base.bias)


def _dequantized(module: QuantizedLinear | QuantizedEmbedding) -> Tensor:
    return module.dense().weight.detach().cpu()


def _merged(layer: BaseTunerLayer, attribute: str) -> Tensor:
    # A copy is merged, so that the trained model stays what it is; it is one layer's size.
    merged = copy.deepcopy(layer)
    merged.merge()
    tensor: Tensor = getattr(merged.get_base_layer(), attribute)
    return tensor.detach().cpu()
