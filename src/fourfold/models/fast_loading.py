"""Loading a folder of safetensors with its tensors read ahead, while Transformers does all the rest.

`from_pretrained` takes a state dict in place of a checkpoint. Given one whose tensors are read when they are asked for,
it builds, converts, quantizes, ties and checks as it does with files of its own, but does not wait for the disk.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled, is_fsdp_enabled

from fourfold.models.checkpoint_files import StoredTensor, stored_tensors
from fourfold.models.reading_ahead import ReadAhead, can_read_ahead

__all__ = ["load_ahead", "loadable_ahead"]


def loadable_ahead(folder: Path, config: PreTrainedConfig) -> dict[str, StoredTensor] | None:
    """The tensors of a checked folder if `load_ahead` loads it as `from_pretrained` would, or None if it may not."""
    if not can_read_ahead() or not folder.is_dir():
        return None
    # Weights of another name, an adapter that is to be loaded with its base.
    if getattr(config, "transformers_weights", None) is not None or (folder / "adapter_config.json").exists():
        return None
    # A part of a larger model, or one of several classes: which, Transformers finds out from a folder only.
    if "text_config" in config.sub_configs or not isinstance(_model_class(config), type):
        return None
    # There some processes read nothing, or a part of each tensor.
    if is_deepspeed_zero3_enabled() or is_fsdp_enabled():
        return None
    return stored_tensors(folder)


def load_ahead(
    folder: Path, stored: dict[str, StoredTensor], config: PreTrainedConfig, device: torch.device, **options: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """What `from_pretrained(folder, config=config, device_map={"": device}, **options)` gives, and its loading report.

    Args:
        folder: The checkpoint.
        stored: Its tensors, as `loadable_ahead` gives them.
        config: The model's configuration.
        device: Where to.
        options: As of `from_pretrained`; `output_loading_info` is set.

    Raises:
        CheckpointError: A file cannot be read, or has become shorter since it was checked.
    """
    with ReadAhead(stored, device) as reader:
        try:
            model, report = _model_class(config).from_pretrained(
                None,
                config=config,
                state_dict=reader.tensors,
                device_map={"": device},
                output_loading_info=True,
                **options,
            )
        except Exception:
            # Transformers makes of it one line of its report on the tensor.
            if reader.error is not None:
                raise reader.error from None
            raise
        if reader.error is not None:
            raise reader.error
    _name(model, str(folder))
    if model.can_generate():
        model.generation_config = _generation_config(folder)
    return model, report


def _model_class(config: PreTrainedConfig) -> Any:
    return MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)


def _name(model: PreTrainedModel, name: str) -> None:
    """Tell the model, and those that it is made of, the folder that they come from: PEFT and cards say it."""
    unnamed = model.name_or_path
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and module.name_or_path == unnamed:
            module.name_or_path = name
            if module.config.name_or_path == unnamed:
                module.config.name_or_path = name


def _generation_config(folder: Path) -> GenerationConfig:
    if (folder / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(folder)
    # What config.json says of it has no place in the model's config.
    return GenerationConfig.from_pretrained(folder, config_file_name="config.json", _from_model_config=True)
