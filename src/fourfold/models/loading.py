"""Loading any checkpoint: 16-bit, ours, bitsandbytes' 4-bit and 8-bit (without bitsandbytes), GGUF."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from fourfold.errors import CheckpointError, ConfigError
from fourfold.models.checkpoint_files import check_checkpoint, check_gguf
from fourfold.models.fast_loading import load_ahead, loadable_ahead
from fourfold.quantization.hf_config import QUANT_METHOD, FourfoldConfig
from fourfold.quantization.hf_quantizer import quantize_model
from fourfold.quantization.linear import QuantizedLinear

__all__ = ["default_device", "default_dtype", "load_model", "load_tokenizer", "read_config"]

# A CPU quantizes weights where the file is mapped into memory: to copy them first would gain it nothing.
READ_AHEAD_FOR = ("cuda",)


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device computes in it; else fp16 on a GPU, fp32 on a CPU."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    has_bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if has_bf16 else torch.float32


def load_model(
    path_or_name: str | Path,
    *,
    quantization: FourfoldConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    revision: str | None = None,
    attn_implementation: str | None = None,
    num_labels: int | None = None,
) -> PreTrainedModel:
    """Load a causal LM.

    Args:
        path_or_name: A folder, a `.gguf` file, or a hub's name.
        quantization: Quantize a 16-bit checkpoint while it loads. A checkpoint that is quantized already stays as it
            is, and needs none.
        dtype: What is not quantized is held, and everything computed, in this dtype (default: `default_dtype`).
        device: Where to (default: `default_device`).
        revision: Branch, tag or commit on the hub.
        attn_implementation: As in Transformers.
        num_labels: Give a sequence classifier of that many scores instead; its head, `score`, is new where the
            checkpoint has none.

    Raises:
        CheckpointError: A missing, half-written or pickled checkpoint, one whose weights do not fit its config or
            are not finite, or one quantized by a method we do not read.
        QuantizationError: Weights that are not finite, or options that do not fit the model.
    """
    path = Path(path_or_name)
    target = torch.device(device) if device is not None else default_device()
    dtype = dtype or default_dtype(target)
    if num_labels is not None and path.suffix == ".gguf":
        raise ConfigError(
            "a GGUF file holds no model that gives scores", found=path, allowed="a safetensors checkpoint"
        )
    if path.suffix == ".gguf":
        return _load_gguf(path, quantization, dtype, target)
    if path.exists():
        check_checkpoint(path)
    config = read_config(str(path_or_name), revision)
    entry = getattr(config, "quantization_config", None)
    if entry is not None:
        entry = entry if isinstance(entry, dict) else entry.to_dict()
        config.quantization_config = _our_entry(str(path_or_name), entry)
        quantization = None
    options: dict[str, Any] = {
        "quantization_config": quantization,
        "dtype": dtype,
        "attn_implementation": attn_implementation,
        # Refused below, by name.
        "ignore_mismatched_sizes": True,
    }
    auto = AutoModelForCausalLM
    if num_labels is not None:
        auto, config.num_labels = AutoModelForSequenceClassification, num_labels
    is_ahead = target.type in READ_AHEAD_FOR and num_labels is None
    stored = loadable_ahead(path, config) if is_ahead else None
    model: PreTrainedModel
    if stored is not None:
        model, report = load_ahead(path, stored, config, target, **options)
    else:
        model, report = auto.from_pretrained(
            str(path_or_name),
            config=config,
            device_map={"": target},
            revision=revision,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    if num_labels is not None:
        report["missing_keys"] = {key for key in report["missing_keys"] if not key.startswith("score.")}
    _check_loaded(str(path_or_name), model, report)
    return model


def _check_loaded(name: str, model: nn.Module, report: dict[str, Any]) -> None:
    """Transformers fills what a checkpoint lacks with random numbers and warns; here that is an error."""
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(
            f"{name} lacks weights of its model",
            found=f"{len(missing)} missing: {', '.join(missing[:4])}",
            hint="the checkpoint was half written, or is not a causal language model's: get it again",
        )
    wrong = [f"{key}: {tuple(found)}, not {tuple(wanted)}" for key, found, wanted in sorted(report["mismatched_keys"])]
    for path, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            wanted = (module.out_features, module.in_features)
            if tuple(module.quantized.shape) != wanted:
                wrong.append(f"{path}.weight: {tuple(module.quantized.shape)}, not {wanted}")
    if wrong:
        raise CheckpointError(
            f"weights in {name} do not have the shapes of its config.json",
            found="; ".join(wrong[:4]),
            hint="config.json and the weights do not belong together: get the checkpoint again",
        )
    dense = {path: parameter for path, parameter in model.named_parameters() if parameter.is_floating_point()}
    # A sum is finite only if all is; one that overflows is looked at element by element. All are looked at together,
    # so that the GPU is waited for once.
    sums = [parameter.detach().sum(dtype=torch.float32) for parameter in dense.values()]
    are_finite = torch.stack(sums).isfinite().tolist() if sums else []
    for (path, parameter), is_finite in zip(dense.items(), are_finite, strict=True):
        if not is_finite:
            bad = int((~parameter.isfinite()).sum())
            if bad:
                raise CheckpointError(
                    f"{path} in {name} holds values that are not finite",
                    found=f"{bad} of {parameter.numel()} elements",
                    hint="the checkpoint is damaged, or was saved from a run that diverged: get it again",
                )


def load_tokenizer(path_or_name: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer beside a checkpoint.

    Raises:
        CheckpointError: There is none.
    """
    path = Path(path_or_name)
    options: dict[str, Any] = {"revision": revision}
    if path.suffix == ".gguf":
        options["gguf_file"], path_or_name = path.name, path.parent
    try:
        return AutoTokenizer.from_pretrained(str(path_or_name), **options)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"no tokenizer for {path_or_name}: {error}") from error


def read_config(path_or_name: str, revision: str | None) -> Any:
    """Transformers' configuration of a model. Raises CheckpointError where there is none, or one that is damaged."""
    try:
        return AutoConfig.from_pretrained(path_or_name, revision=revision)
    except StrictDataclassError as error:
        raise CheckpointError(
            f"the config.json of {path_or_name} holds a value of a wrong type", found=" ".join(str(error).split())
        ) from error
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no model {path_or_name!r}: {str(error).splitlines()[0]}",
            allowed="a folder with config.json and safetensors, a .gguf file, or a name on the hub",
        ) from error


def _our_entry(name: str, entry: dict[str, Any]) -> dict[str, Any]:
    """The quantization entry that makes Transformers use our quantizer for a checkpoint we can read."""
    method = entry.get("quant_method")
    if method == QUANT_METHOD:
        return entry
    holds_int8 = entry.get("load_in_8bit") and not entry.get("llm_int8_has_fp16_weight")
    if method == "bitsandbytes" and (entry.get("load_in_4bit") or holds_int8):
        config = FourfoldConfig.from_bitsandbytes(entry)
        return {"quant_method": QUANT_METHOD, **{key: getattr(config, key) for key in config.option_names()}}
    raise CheckpointError(
        f"{name} is quantized by a method that cannot be trained on here",
        found=f"quant_method={method!r}" + (" (8-bit, its weights in fp16)" if entry.get("load_in_8bit") else ""),
        allowed=["bitsandbytes 4-bit and 8-bit", QUANT_METHOD, "a 16-bit checkpoint"],
    )


def _load_gguf(
    path: Path, quantization: FourfoldConfig | None, dtype: torch.dtype, device: torch.device
) -> PreTrainedModel:
    """Transformers makes a dense model of a GGUF file; it is quantized afterwards: the 16-bit model is there once."""
    check_gguf(path)
    options: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        # Releases that can keep GGUF's own blocks do so unless told not to.
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=dtype, **options
    )
    if quantization is not None:
        quantize_model(model, quantization)
    return model.to(device)
