"""A merged 16-bit model in safetensors, shard by shard: one shard is in memory at a time."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fourfold.export.agreement import Bounds
from fourfold.export.merged_weights import MergedTensor, merged_tensors
from fourfold.export.trained import Reading, Trained, generation_config, read_folder
from fourfold.models.underlying import underlying

__all__ = ["BOUNDS", "MAX_SHARD_BYTES", "read", "write", "write_model"]

BOUNDS = {"": Bounds(kl=1e-3, top1=0.995)}
MAX_SHARD_BYTES = 2 * 2**30


def write(trained: Trained, folder: Path, quantization: str | None = None) -> list[str]:
    """Write model, configuration and tokenizer."""
    write_model(trained, folder, MAX_SHARD_BYTES)
    return [f"serve it: vllm serve {folder}"]


def write_model(trained: Trained, folder: Path, max_shard_bytes: int) -> None:
    """Write shards of at most so many bytes (one tensor at least), and their index where there are several."""
    base = underlying(trained.model)
    shards: list[list[MergedTensor]] = [[]]
    room = max_shard_bytes
    for tensor in merged_tensors(trained.model):
        size = 2 * torch.Size(tensor.shape).numel()
        if size > room and shards[-1]:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= size
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{index:05}-of-{len(shards):05}.safetensors" for index in range(1, len(shards) + 1)]
    )
    total = 0
    for name, shard in zip(names, shards, strict=True):
        values = {tensor.name: tensor.read().to(trained.dtype).contiguous() for tensor in shard}
        total += sum(value.nbytes for value in values.values())
        save_file(values, folder / name, {"format": "pt"})
    if len(shards) > 1:
        placed = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        index = {"metadata": {"total_size": total}, "weight_map": placed}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    config = copy.deepcopy(base.config)
    config.dtype = trained.dtype
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config.architectures = [type(base).__name__]
    config.save_pretrained(folder)
    generation_config(trained.stops, base.generation_config).save_pretrained(folder)
    trained.tokenizer.save_pretrained(folder)


def read(trained: Trained, folder: Path, reference: Sequence[Tensor]) -> dict[str, Reading]:
    """Plain Transformers, in fp32."""
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, device_map={"": trained.model.device}, use_safetensors=True
    )
    return {"transformers": read_folder(trained, folder, model, reference, transformers.__version__)}
