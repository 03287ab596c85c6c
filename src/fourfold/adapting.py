"""What of a model a run trains: an adapter put on it, or all of it."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fourfold.adapters.initialisation import changes_base
from fourfold.config import RunConfig
from fourfold.config import options as choices
from fourfold.errors import ConfigError
from fourfold.files import whole_folder
from fourfold.inputs import BASE_FOLDER, original_checkpoint, write_base
from fourfold.models.preparing import prepare
from fourfold.training import run_folder

__all__ = ["adapt", "save_base", "save_result"]


def adapt(config: RunConfig, model: PreTrainedModel, *, is_initialised: bool) -> PreTrainedModel | PeftModel:
    """Put the adapter on; `is_initialised`: its weights, and the base they belong to, come from a checkpoint."""
    if config.adapter is None:
        if getattr(model, "is_quantized", False):
            raise ConfigError(
                "all weights are to be trained, and the model's are quantized",
                found=f"adapter: null with {config.model_name_or_path}",
                allowed="a checkpoint in 16 or 32 bits, or adapter: lora",
            )
        return model
    method = config.init_lora_weights if isinstance(config.init_lora_weights, str) else None
    if method == "gaussian" or (is_initialised and getattr(model, "is_quantized", False)):
        method = None
    return prepare(
        model,
        choices.lora_config(config),
        init_lora_weights=method,
        original=original_checkpoint(config) if method else None,
        loftq_iterations=config.loftq_iterations,
        fused=config.fused_blocks,
        recompute=config.recompute,
        cuda_graphs=config.cuda_graphs,
        **choices.stream_options(config),
    )


def save_base(config: RunConfig, output: Path, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Where the adapter's initialisation changed the base: that base, to which alone the adapter belongs."""
    # One that changes as the run goes on is saved with each checkpoint, and at the end.
    if not changes_base(config.init_lora_weights, config.loftq_iterations) or config.requantize_every is not None:
        return
    if (output / BASE_FOLDER).is_dir():
        model.peft_config["default"].base_model_name_or_path = str(output / BASE_FOLDER)
    else:
        _write_own_base(output, model, tokenizer)


def _write_own_base(output: Path, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Write the base as it is now into the run folder, and name it in the adapter's configuration."""
    with whole_folder(output / BASE_FOLDER) as folder:
        write_base(model, tokenizer, folder)
    model.peft_config["default"].base_model_name_or_path = str(output / BASE_FOLDER)


def save_result(
    config: RunConfig,
    output: Path,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict[str, Tensor] | None,
) -> None:
    """Write what was trained into the run folder: the adapter, with its base where the run changed that, or the model.

    Args:
        weights: What is trained, whole, where the model holds but a part of it; None: the model's own.
    """
    if not isinstance(model, PeftModel):
        run_folder.save_model(output, model, tokenizer, weights)
        return
    if config.requantize_every is not None:
        _write_own_base(output, model, tokenizer)
    run_folder.save_adapter(output, model, tokenizer, weights)
