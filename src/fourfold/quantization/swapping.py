"""What of a model is quantized, and the modules that take its place."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fourfold.errors import QuantizationError
from fourfold.quantization.embedding import QuantizedEmbedding
from fourfold.quantization.experts import expert_parameters
from fourfold.quantization.hf_config import FourfoldConfig
from fourfold.quantization.linear import QuantizedLinear
from fourfold.quantization.selection import matches, unmatched

__all__ = [
    "base_state_dict",
    "dense_linears",
    "empty_embedding",
    "empty_linear",
    "expert_names",
    "input_embedding",
    "left_dense",
    "share_codes",
    "skip_patterns",
    "tied_head_of",
]


def base_state_dict(model: nn.Module, tied_head: str | None = None) -> dict[str, Tensor]:
    """The state dict of a base that PEFT may have put adapters into: under its own names, without their entries.

    Args:
        model: The base.
        tied_head: Name of a head whose codes and scales are the embedding's, and are saved once.
    """
    state = {
        name.replace(".base_layer.", ".").replace(".original_module.", "."): value
        for name, value in model.state_dict().items()
        if ".lora_" not in name and ".modules_to_save." not in name
    }
    return {name: value for name, value in state.items() if not tied_head or not name.startswith(f"{tied_head}.weight")}


def share_codes(model: PreTrainedModel, head_name: str) -> None:
    """Give the output head the codes and scales of the embedding."""
    head, table = model.get_submodule(head_name), model.get_input_embeddings()
    head.weight = table.weight
    head.set_scales(table.quantized)


def dense_linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """Layers that hold a dense matrix: `nn.Linear` itself, not what derives from it, and GPT-2's transposed twin."""
    for name, module in model.named_modules():
        if type(module) is nn.Linear or isinstance(module, Conv1D):
            yield name, module


def empty_linear(linear: nn.Linear, config: FourfoldConfig) -> QuantizedLinear:
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


def input_embedding(model: PreTrainedModel) -> tuple[str, nn.Embedding]:
    table = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is table)
    if type(table) is not nn.Embedding:
        raise QuantizationError(
            f"the embedding {name} does more than look up rows, and cannot be quantized",
            found=type(table).__name__,
            allowed="quantize_embeddings=False for this model",
        )
    return name, table


def empty_embedding(table: nn.Embedding, config: FourfoldConfig) -> QuantizedEmbedding:
    layer = QuantizedEmbedding(
        table.num_embeddings,
        table.embedding_dim,
        table.padding_idx,
        number_format=config.bnb_4bit_quant_type,
        device="meta",
        dtype=table.weight.dtype,
    )
    layer._is_hf_initialized = True  # type: ignore[assignment]
    return layer


def tied_head_of(model: PreTrainedModel) -> str | None:
    """Name of the quantized output head that shares the embedding's weight."""
    head = model.get_output_embeddings()
    if not getattr(model.config, "tie_word_embeddings", False) or not isinstance(head, QuantizedLinear):
        return None
    name: str = next(name for name, module in model.named_modules() if module is head)
    return name


def left_dense(model: nn.Module, experts: list[str]) -> list[str]:
    """Full names of what was not quantized: of globs bitsandbytes would make regular expressions."""
    linears = {name for name, _ in dense_linears(model)}
    parameters = {f"{path}.{name}" for path, module in model.named_modules() for name in expert_parameters(module)}
    return sorted(linears | parameters - set(experts))


def skip_patterns(model: PreTrainedModel, config: FourfoldConfig, pre_quantized: bool = False) -> list[str]:
    """Names and globs of the modules that stay as they are."""
    names = [name for name, _ in model.named_modules()] + [name for name, _ in model.named_parameters()]
    # Files of others name modules of models that this one is only a part of.
    wrong = [] if pre_quantized else unmatched(names, config.modules_to_not_convert)
    if wrong:
        raise QuantizationError(
            "modules_to_not_convert names modules that the model does not have",
            found=wrong,
            allowed=sorted({name.rpartition(".")[2] for name, _ in dense_linears(model)}),
            hint="give a module's name, a part of its path, or a glob such as 'model.layers.0.*'",
        )
    skipped = [*config.modules_to_not_convert, *(getattr(model, "_keep_in_fp32_modules", None) or [])]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    head_name = next((name for name, module in model.named_modules() if module is head), None)
    if head_name is None:
        return skipped
    is_tied = getattr(model.config, "tie_word_embeddings", False)
    if is_tied and config.quantize_embeddings:
        return [pattern for pattern in skipped if pattern != head_name]
    if not config.quantize_lm_head:
        return [*skipped, head_name]
    if is_tied:
        if pre_quantized:
            return [*skipped, head_name]
        raise QuantizationError(
            f"{head_name} shares its weight with the embedding, which stays in 16 bits",
            found="quantize_lm_head=True",
            allowed="quantize_embeddings=True, which quantizes both, or quantize_lm_head=False",
        )
    return skipped


def expert_names(model: nn.Module, skipped: list[str], config: FourfoldConfig) -> list[str]:
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
    if known and config.load_in_8bit:
        raise QuantizationError(
            "LLM.int8() is made of products of linear layers, and experts in one 3-D parameter are none",
            found=known[:8],
            allowed="bnb_4bit_quant_type='int8' (blocks of int8), or these names in modules_to_not_convert",
        )
    return known
