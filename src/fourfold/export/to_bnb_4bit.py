"""A merged model quantized anew, in the layout of bitsandbytes' 4-bit files, which Transformers and vLLM read."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fourfold.export.agreement import Bounds
from fourfold.export.to_safetensors import MAX_SHARD_BYTES, write_model
from fourfold.export.trained import Reading, Trained, generation_config, read_folder
from fourfold.models.loading import load_model
from fourfold.quantization.hf_config import FourfoldConfig

__all__ = ["BOUNDS", "read", "write"]

# The sum of base and adapter is rounded to 4 bits once more: another model, as any other 4-bit export is.
BOUNDS = {"nf4": Bounds(kl=1.5, top1=0.5), "fp4": Bounds(kl=1.5, top1=0.5)}


def write(trained: Trained, folder: Path, quantization: str | None) -> list[str]:
    """Write the merged model aside, and quantize it from there as any checkpoint is."""
    with tempfile.TemporaryDirectory(prefix=".merged-", dir=folder) as merged:
        write_model(trained, Path(merged), MAX_SHARD_BYTES)
        options = FourfoldConfig(bnb_4bit_quant_type=quantization or "nf4")
        model = load_model(merged, quantization=options, dtype=trained.dtype, device=trained.model.device)
        model.save_pretrained(folder)
        generation_config(trained.stops, model.generation_config).save_pretrained(folder)
        trained.tokenizer.save_pretrained(folder)
    return [f"serve it: vllm serve {folder} --quantization bitsandbytes"]


def read(trained: Trained, folder: Path, reference: Sequence[Tensor]) -> dict[str, Reading]:
    """Plain Transformers with bitsandbytes where that is installed; else Fourfold's own reader of these files."""
    device = trained.model.device
    model: PreTrainedModel
    if importlib.util.find_spec("bitsandbytes") is not None:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map={"": device})
        version = f"{transformers.__version__}, bitsandbytes {importlib.metadata.version('bitsandbytes')}"
        return {"transformers with bitsandbytes": read_folder(trained, folder, model, reference, version)}
    model = load_model(folder, dtype=torch.float32, device=device)
    return {"fourfold": read_folder(trained, folder, model, reference, importlib.metadata.version("fourfold"))}
