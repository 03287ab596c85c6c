"""Putting adapters on a model."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from fourfold.adapters.initialisation import initialise
from fourfold.adapters.lora import is_weight_dependent, register
from fourfold.errors import AdapterError, CheckpointError, ConfigError
from fourfold.kernels.availability import triton_refuses
from fourfold.models.attention_interface import register_attention
from fourfold.models.block import fuse_blocks
from fourfold.models.checkpoint_files import check_safetensors
from fourfold.models.families import default_target_modules
from fourfold.models.recomputation import policies_of
from fourfold.models.streaming import stream_base as stream_the_base
from fourfold.models.weights import OriginalWeights
from fourfold.quantization.linear import QuantizedLinear

__all__ = ["add_adapter", "load_adapter", "prepare"]

logger = logging.getLogger(__name__)


def prepare(
    model: PreTrainedModel,
    lora_config: LoraConfig,
    *,
    init_lora_weights: str | None = None,
    original: str | Path | None = None,
    loftq_iterations: int = 1,
    fused: bool | None = None,
    recompute: str | Sequence[str] | None = None,
    cuda_graphs: bool | None = None,
    stream_base: str | None = None,
    device: torch.device | str | None = None,
) -> PeftModel:
    """Put LoRA adapters on a model, quantized or not, and fused blocks in the place of its decoder layers.

    Args:
        model: Any causal LM of Transformers. It is changed in place.
        lora_config: PEFT's configuration. Without `target_modules` the family's default is taken. It is not changed.
        init_lora_weights: "pissa", "pissa_niter_N" or "loftq", instead of what the configuration says. (PEFT's own
            configuration takes "loftq" only where SciPy is installed, which is not needed here.)
        original: The 16-bit checkpoint the model came from: a folder with safetensors. PiSSA is better with it, LoftQ
            needs it.
        loftq_iterations: Alternations of LoftQ.
        fused: Whether the families of `FAMILIES` that have a fused block get it; None: on a GPU that has its kernels.
        recompute: What a fused block computes again in the backward pass: a policy of
            `fourfold.models.recomputation.POLICIES`, or one for each layer. None follows the model's
            `gradient_checkpointing_enable()`: "full" after it, "none" without it.
        cuda_graphs: Whether fused blocks are replayed as CUDA graphs where batches keep their shape; None: batches of
            at most `fourfold.models.graphs.AUTO_TOKENS` tokens.
        stream_base: "host" or "disk": quantized decoder layers stay there and pass through the GPU, so that a model
            larger than it can be trained; load that to the CPU. See `fourfold.models.streaming.stream_base`.
        device: Where the model will be computed, if its base streams or is sharded; None: for a base that streams the
            current GPU, or the CPU; for others where it is.

    Returns:
        PEFT's model; its `save_pretrained` writes what plain PEFT reads. An adapter that changed its base (PiSSA, LoftQ
        of several iterations) belongs to that base alone: save it too, as `fourfold train` does.

    Raises:
        AdapterError: Targets the model does not have, or an initialisation that does not fit.
        ConfigError: An unknown policy, or policies where blocks are not fused; a base that cannot stream.
        CheckpointError, TrainingError: As `fourfold.models.streaming.stream_base`.
    """
    prepared = _with_adapters(model, lora_config, init_lora_weights, original, loftq_iterations)
    if stream_base is not None:
        stream_the_base(prepared, device, source=stream_base)
    _fuse(prepared, fused, recompute, cuda_graphs, device)
    return prepared


def _with_adapters(
    model: PreTrainedModel,
    lora_config: LoraConfig,
    init_lora_weights: str | None,
    original: str | Path | None,
    loftq_iterations: int,
) -> PeftModel:
    config = register(copy.deepcopy(lora_config))
    if config.target_modules is None and not config.target_parameters:
        config.target_modules = default_target_modules(model.config.model_type)
    _check_targets(model, config)
    method = init_lora_weights or config.init_lora_weights
    if not is_weight_dependent(method):
        return get_peft_model(model, config)
    if config.use_dora:
        raise AdapterError(
            "DoRA takes its magnitudes from the base weight, which this initialisation changes",
            found=f"use_dora with init_lora_weights={method!r}",
            hint="use one of the two",
        )
    if not any(isinstance(module, QuantizedLinear) for module in model.modules()):
        if method == "loftq":
            raise AdapterError(
                "LoftQ makes up for what quantizing loses, and this model is not quantized",
                hint="load the model in 4 bits, or use another initialisation",
            )
        # Over ordinary layers PiSSA is PEFT's own.
        config.init_lora_weights = method
        split = get_peft_model(model, config)
        split.peft_config["default"].init_lora_weights = True
        return split
    # What is saved describes a finished adapter: whoever loads it must not decompose the base once more.
    config.init_lora_weights = True
    prepared = get_peft_model(model, config)
    weights = OriginalWeights(original) if original is not None else None
    initialise(prepared, method, weights, loftq_iterations=loftq_iterations)
    return prepared


def _fuse(
    model: PeftModel,
    fused: bool | None,
    recompute: str | Sequence[str] | None,
    cuda_graphs: bool | None,
    device: torch.device | str | None = None,
) -> None:
    base = model.get_base_model()
    if any(isinstance(one, QuantizedLinear) and one.number_format.is_vectorwise for one in base.modules()):
        if fused:
            logger.info("Decoder layers take the generic path: LLM.int8() rounds the input of each linear layer")
        fused = False
    if fused is None:
        weight = base.get_input_embeddings().weight
        refusal = triton_refuses(weight if device is None else torch.empty(0, dtype=weight.dtype, device=device))
        fused = refusal is None
        if refusal is not None and weight.device.type == "cuda":
            logger.warning("Decoder layers take the generic path, which is slower: %s", refusal)
    num_fused = fuse_blocks(base, recompute, cuda_graphs) if fused else 0
    if num_fused and base.config._attn_implementation == "sdpa":
        # For what takes the generic path, and for masks: none is built that the blocks would not look at.
        base.set_attn_implementation(register_attention())
    if fused and not num_fused:
        logger.info("%s has no fused block; its layers take the generic path", base.config.model_type)
    if recompute is not None and not num_fused:
        policies_of(recompute, base.config.num_hidden_layers)
        raise ConfigError(
            "recomputation policies belong to the fused blocks, which this model does not get",
            found=f"recompute={recompute!r}",
            hint="use gradient_checkpointing, or a family with fused blocks on a GPU of compute capability 8.0",
        )


def load_adapter(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    is_trainable: bool = False,
    fused: bool | None = None,
    stream_base: str | None = None,
    device: torch.device | str | None = None,
) -> PeftModel:
    """Put a saved adapter on its base, and fused blocks as `prepare` does; the base streams if `prepare` would have it.

    Raises:
        CheckpointError: The folder holds no adapter, holds it as a pickle, or its files are damaged.
        AdapterError: An adapter that belongs to a base which plain PEFT would have to compute anew.
    """
    folder = Path(folder)
    config = _read_adapter_config(folder)
    with _naming_base(config, folder, model):
        loaded = PeftModel.from_pretrained(model, str(folder), config=config, is_trainable=is_trainable)
    if stream_base is not None:
        stream_the_base(loaded, device, source=stream_base)
    _fuse(loaded, fused, None, False)
    return loaded


def add_adapter(model: PeftModel, folder: str | Path, name: str) -> None:
    """Put another saved adapter beside those of a model; the active one stays active.

    Args:
        model: From `load_adapter` or `prepare`.
        folder: The adapter's.
        name: Its name in the model, without dots.

    Raises:
        CheckpointError, AdapterError: As `load_adapter`.
    """
    folder = Path(folder)
    config = _read_adapter_config(folder)
    with _naming_base(config, folder, model.get_base_model()):
        # The configuration first: it says how PEFT wraps a quantized layer.
        model.add_adapter(name, config)
        model.load_adapter(str(folder), name, is_trainable=False)


def _read_adapter_config(folder: Path) -> PeftConfig:
    """The configuration of a saved adapter, whose files are there and whole."""
    if not (folder / "adapter_config.json").is_file():
        raise CheckpointError(
            f"no adapter in {folder}",
            found=_listing(folder),
            allowed="adapter_config.json and adapter_model.safetensors",
        )
    if not (folder / "adapter_model.safetensors").is_file():
        if (folder / "adapter_model.bin").is_file():
            raise CheckpointError(
                f"{folder / 'adapter_model.bin'} is a pickle, which can run code when it is loaded",
                allowed="adapter_model.safetensors",
                hint="convert it on a machine you can lose: load it there and save it with safe_serialization=True",
            )
        raise CheckpointError(f"{folder / 'adapter_model.safetensors'} is missing", found=_listing(folder))
    check_safetensors(folder / "adapter_model.safetensors")
    try:
        json.loads((folder / "adapter_config.json").read_text())
    except ValueError as error:
        raise CheckpointError(
            f"{folder / 'adapter_config.json'} cannot be read: {error}", hint="it was half written: get it again"
        ) from error
    config = PeftConfig.from_pretrained(str(folder))
    if isinstance(config, LoraConfig):
        _check_initialisation(config, folder)
        register(config)
    return config


@contextlib.contextmanager
def _naming_base(config: PeftConfig, folder: Path, model: PreTrainedModel) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        # PEFT's message lists every tensor; a target that is not there is a ValueError.
        if "size mismatch" not in str(error) and "not found in the base model" not in str(error):
            raise
        raise AdapterError(
            f"the adapter in {folder} belongs to another base",
            found=f"{config.base_model_name_or_path} in its configuration, and {model.config.name_or_path} here",
            hint="load the base that it was trained on",
        ) from error


def _check_initialisation(config: LoraConfig, folder: Path) -> None:
    """Make the configuration one of a finished adapter, whose A and B are read and not computed."""
    if config.init_lora_weights == "loftq":
        # PEFT keeps the word in what it saves; the base that is given is the adapter's own.
        config.init_lora_weights = True
    elif is_weight_dependent(config.init_lora_weights):
        raise AdapterError(
            f"{folder} belongs to a base that is left after its decomposition, not to the model's own weights",
            found=f"init_lora_weights={config.init_lora_weights!r}",
            hint="save it with PEFT's path_initial_model_for_weight_conversion, which makes an ordinary adapter of it",
        )


def _listing(folder: Path) -> str:
    if not folder.is_dir():
        return "no such folder"
    return ", ".join(sorted(path.name for path in folder.iterdir())) or "an empty folder"


def _check_targets(model: nn.Module, config: LoraConfig) -> None:
    """Every name, and a pattern, must mean something: PEFT itself is content if one name of several does."""
    targets = config.target_modules
    if targets is None or targets == "all-linear":
        return
    linears = [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Embedding, Conv1D))]
    if isinstance(targets, str):
        wrong = [] if _any_match(targets, linears) else [targets]
    else:
        wrong = [target for target in targets if not any(f".{name}".endswith(f".{target}") for name in linears)]
    if wrong:
        raise AdapterError(
            "target_modules names layers that the model does not have",
            found=sorted(wrong),
            allowed=[*sorted({name.rpartition(".")[2] for name in linears}), "all-linear"],
            hint="take names from the list, or leave target_modules out for the family's default; a text instead of a "
            "list is a regular expression over whole names such as 'model.layers.0.mlp.up_proj'",
        )


def _any_match(pattern: str, names: list[str]) -> bool:
    try:
        return any(re.fullmatch(pattern, name) for name in names)
    except re.error as error:
        raise AdapterError("target_modules is no regular expression", found=f"{pattern!r}: {error}") from error
