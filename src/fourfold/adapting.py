"""What of a model a run trains: an adapter put on it, or all of it."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fourfold.adapters.initialisation import changes_base
from fourfold.config import RunConfig
from fourfold.config import options as choices
from fourfold.errors import ConfigError
from fourfold.files import whole_folder
from fourfold.inputs import BASE_FOLDER, original_checkpoint
from fourfold.models.preparing import prepare
from fourfold.quantization.swapping import base_state_dict

__all__ = ["adapt", "save_base"]


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
    base = model.get_base_model()
    folder = output / BASE_FOLDER
    if not changes_base(config.init_lora_weights, config.loftq_iterations):
        return
    if not folder.is_dir():
        with whole_folder(folder) as partial:
            base.save_pretrained(
                partial,
                state_dict=base_state_dict(base, getattr(getattr(base, "hf_quantizer", None), "tied_head", None)),
            )
            tokenizer.save_pretrained(partial)
    model.peft_config["default"].base_model_name_or_path = str(folder)
