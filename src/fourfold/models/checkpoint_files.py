"""Checks of a checkpoint's files before anything of it is loaded, and what tensors lie where in them."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import torch

from fourfold.errors import CheckpointError

__all__ = ["StoredTensor", "check_checkpoint", "check_gguf", "check_safetensors", "stored_tensors", "stored_tensors_of"]

# Those of safetensors' names whose elements are whole bytes of a dtype that all supported releases of torch have.
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

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


def check_gguf(path: Path) -> None:
    """Raise CheckpointError if the file is missing, is no GGUF file, or ends before its last tensor does."""
    if not path.is_file():
        raise CheckpointError(f"no such file: {path}")
    size = path.stat().st_size
    try:
        # It maps the file, and takes each tensor's bytes from where the header says that they are.
        gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        raise CheckpointError(
            f"{path} is cut short or damaged" if is_gguf else f"{path} is no GGUF file",
            found=f"{size} bytes; {error}",
            hint="get the file again",
        ) from error


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a safetensors file.

    Args:
        path: The file.
        offset: The tensor's first byte, counted from the file's.
        num_bytes: Its length.
        dtype: Its dtype.
        dtype_name: The same as the file names it.
        shape: Its shape.
    """

    path: Path
    offset: int
    num_bytes: int
    dtype: torch.dtype
    dtype_name: str
    shape: tuple[int, ...]


def stored_tensors(folder: Path) -> dict[str, StoredTensor] | None:
    """The tensors of a folder that `check_checkpoint` has found whole, by name.

    The files are those that Transformers takes: `model.safetensors`, or every shard that the index names.

    Returns:
        None if both are there, of which one may not have been checked, or if a header holds what is not known here: a
        dtype, a length that is not its shape's, tensors that overlap.
    """
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file() == index.is_file():
        return None
    if single.is_file():
        paths = [single]
    else:
        paths = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    tensors: dict[str, StoredTensor] = {}
    for path in paths:
        found = _read_header(path)
        if found is None:
            return None
        tensors |= found
    return tensors


def stored_tensors_of(path: Path) -> dict[str, StoredTensor]:
    """The tensors of one file that `check_safetensors` has found whole, by name.

    Raises:
        CheckpointError: A header that holds what is not known here.
    """
    tensors = _read_header(path)
    if tensors is None:
        raise CheckpointError(f"the header of {path} cannot be read", hint="get the checkpoint again")
    return tensors


def _read_header(path: Path) -> dict[str, StoredTensor] | None:
    with path.open("rb") as file:
        header_size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(header_size))
    header.pop("__metadata__", None)
    try:
        tensors = {name: _stored_tensor(path, 8 + header_size, entry) for name, entry in header.items()}
    except (KeyError, TypeError, ValueError):
        return None
    # As safetensors wants it: one tensor begins where another ends.
    end = 8 + header_size
    for tensor in sorted(tensors.values(), key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        if tensor.offset != end:
            return None
        end += tensor.num_bytes
    return tensors


def _stored_tensor(path: Path, data_offset: int, entry: dict[str, Any]) -> StoredTensor:
    dtype, shape, (begin, end) = _DTYPES[entry["dtype"]], tuple(entry["shape"]), entry["data_offsets"]
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{end - begin} bytes are no tensor of shape {shape}")
    return StoredTensor(path, data_offset + begin, end - begin, dtype, entry["dtype"], shape)
