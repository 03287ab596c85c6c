"""Checks of a checkpoint's files before anything of it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from fourfold.errors import CheckpointError

__all__ = ["check_checkpoint", "check_safetensors"]

_PICKLES = (
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "model.pt",
    "model.pth",
    "consolidated.00.pth",
)


def check_checkpoint(folder: Path) -> None:
    """Raise CheckpointError unless the folder holds a whole model in safetensors.

    Found are: a missing folder, configuration, shard or index entry, a shard that was cut short, and a pickle.
    """
    if not folder.is_dir():
        raise CheckpointError(f"no checkpoint at {folder}", found="no such folder")
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder / 'config.json'} is missing",
            found=", ".join(sorted(path.name for path in folder.iterdir())[:12]) or "an empty folder",
            hint="this is no model folder, or it was half written",
        )
    index = folder / "model.safetensors.index.json"
    single = folder / "model.safetensors"
    if index.is_file():
        try:
            shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{index} cannot be read: {error}", hint="get the checkpoint again") from error
    elif single.is_file():
        shards = [single.name]
    else:
        pickles = [name for name in _PICKLES if (folder / name).exists()]
        if pickles:
            raise CheckpointError(
                f"{folder / pickles[0]} is a pickle, which can run code when it is loaded",
                allowed="safetensors",
                hint="get the model's safetensors, or convert it on a machine you can lose",
            )
        raise CheckpointError(f"no weights in {folder}", allowed="model.safetensors, or shards with their index")
    for shard in shards:
        check_safetensors(folder / shard)


def check_safetensors(path: Path) -> None:
    """Raise CheckpointError if the file is missing or its length is not what its header says.

    The header is an 8-byte little-endian length and a JSON object whose entries carry `data_offsets`
    (https://github.com/huggingface/safetensors#format).
    """
    if not path.is_file():
        raise CheckpointError(f"{path} is missing", hint="the checkpoint was half written: get it again")
    size = path.stat().st_size
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        if size < 8 or header_size > size - 8:
            raise CheckpointError(f"{path} is cut short", found=f"{size} bytes", hint="get the checkpoint again")
        try:
            header = json.loads(file.read(header_size))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, IndexError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{path} has no readable header: {error}", hint="get the checkpoint again") from error
    expected = 8 + header_size + max(ends, default=0)
    if size != expected:
        raise CheckpointError(
            f"{path} is cut short" if size < expected else f"{path} is longer than its header says",
            found=f"{size} bytes",
            allowed=f"{expected} bytes",
            hint="get the checkpoint again",
        )
