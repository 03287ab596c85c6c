"""The adapter alone, in PEFT's folder, as vLLM and SGLang take one beside a base model."""

from __future__ import annotations

import json
import math
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import peft
from peft import PeftModel
from torch import Tensor

from fourfold.errors import ConfigError
from fourfold.export.agreement import Bounds, agreement
from fourfold.export.trained import Reading, Trained
from fourfold.export.verification import reference_logits
from fourfold.models.checkpoint_files import check_safetensors, stored_tensors_of
from fourfold.models.underlying import underlying

__all__ = ["BOUNDS", "read", "vllm_command", "write"]

# The same numbers on the same base: what differs is the order of sums.
BOUNDS = {"": Bounds(kl=1e-6, top1=0.999)}

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What vLLM's PEFTHelper refuses, or it or SGLang leave out without a word: key, what may stand there.
_PLAIN: dict[str, Any] = {
    "peft_type": "LORA",
    "use_dora": False,
    "modules_to_save": None,
    "bias": "none",
    "lora_bias": False,
    "rank_pattern": {},
    "alpha_pattern": {},
    "layer_replication": None,
    "fan_in_fan_out": False,
}
# vLLM's choices for --max-lora-rank.
_MAX_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)


def write(trained: Trained, folder: Path, quantization: str | None = None) -> list[str]:
    """Write weights, configuration and tokenizer.

    Raises:
        ConfigError: An adapter that the servers do not take.
    """
    if trained.adapter is None:
        raise ConfigError("there is no adapter to export: the run trained all weights", allowed="--format safetensors")
    config = json.loads((trained.adapter / CONFIG).read_text(encoding="utf-8"))
    wrong = [key for key, plain in _PLAIN.items() if (config.get(key) or plain) != plain]
    if wrong:
        raise ConfigError(
            "vLLM and SGLang take no such adapter",
            found=", ".join(f"{key}: {config[key]}" for key in wrong),
            allowed=", ".join(f"{key}: {_PLAIN[key]}" for key in wrong),
            hint="merge it: --format safetensors",
        )
    if config.get("use_rslora"):
        # SGLang scales by alpha / r whatever stands here.
        config["lora_alpha"] *= math.sqrt(config["r"])
        config["use_rslora"] = False
    config["base_model_name_or_path"] = trained.base
    config["target_modules"] = _target_modules(trained)
    config["inference_mode"] = True
    check_safetensors(trained.adapter / WEIGHTS)
    shutil.copyfile(trained.adapter / WEIGHTS, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    trained.tokenizer.save_pretrained(folder)
    return [
        f"vLLM:   {vllm_command(trained.base, {trained.name: folder})}",
        f"SGLang: python -m sglang.launch_server --model-path {trained.base} --enable-lora "
        f"--lora-paths {trained.name}={folder}",
    ]


def vllm_command(base: str, adapters: Mapping[str, Path]) -> str:
    """The command by which vLLM serves a base, and exported adapters beside it by their names."""
    words = ["vllm", "serve", base]
    if adapters:
        named = [f"{name}={folder}" for name, folder in adapters.items()]
        words += ["--enable-lora", "--lora-modules", *named]
        largest = max(json.loads((folder / CONFIG).read_text(encoding="utf-8"))["r"] for folder in adapters.values())
        words += ["--max-lora-rank", str(next((known for known in _MAX_RANKS if known >= largest), largest))]
    if len(adapters) > 1:
        words += ["--max-loras", str(len(adapters))]
    return shlex.join(words)


def _target_modules(trained: Trained) -> list[str]:
    """The names of the adapted layers without their paths, which is all that SGLang reads.

    Raises:
        ConfigError: Some layers of a name have an adapter and others have none.
    """
    assert trained.adapter is not None
    tensors = stored_tensors_of(trained.adapter / WEIGHTS)
    adapted = {name.removesuffix(".lora_A.weight") for name in tensors if name.endswith(".lora_A.weight")}
    targets = {name.rpartition(".")[2] for name in adapted}
    paths = [path.replace(".base_layer", "") for path, _ in underlying(trained.model).named_modules()]
    meant = {path for path in paths if path.rpartition(".")[2] in targets}
    if len(meant) != len(adapted):
        raise ConfigError(
            "vLLM and SGLang take adapters on all layers of a name",
            found=f"{len(adapted)} adapted layers of {len(meant)} named {', '.join(sorted(targets))}",
            hint="merge it: --format safetensors",
        )
    return sorted(targets)


def read(trained: Trained, folder: Path, reference: Sequence[Tensor]) -> dict[str, Reading]:
    """PEFT, which puts the folder's adapter on the base beside the trained one."""
    model = trained.model
    assert isinstance(model, PeftModel)
    active = model.active_adapter
    model.load_adapter(str(folder), "exported", is_trainable=False)
    try:
        model.set_adapter("exported")
        found = agreement(reference, reference_logits(model, trained.prompts))
    finally:
        model.set_adapter(active)
        model.delete_adapter("exported")
    return {"peft": Reading(found, peft.__version__, {"base": "the run's own"})}
