"""`verification.json`: what was compared before a model that was written was let stand."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from fourfold.export.trained import Reading
from fourfold.files import write_whole

__all__ = ["VERIFICATION_FILE", "folder_bytes", "write_verification"]

VERIFICATION_FILE = "verification.json"
_PACKAGES = ("fourfold", "torch", "transformers", "peft", "gguf", "safetensors")


def folder_bytes(folder: Path) -> int:
    """What the files of a folder take."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def write_verification(
    folder: Path,
    target: str,
    quantization: str | None,
    num_bytes: int,
    bounds: Mapping[str, float | None],
    readings: Mapping[str, Reading],
) -> None:
    """Write the file. Nothing in it names a place of this machine.

    Args:
        folder: Where the model is.
        target: A key of `EXPORTS`.
        quantization: One of the target's; None: none.
        num_bytes: What was written takes.
        bounds: What it was held to: `kl` and `top1`, and what else there is; None: not to that.
        readings: What each reader found.
    """
    record = {
        "format": target,
        "quantization": quantization,
        "num_bytes": num_bytes,
        "bounds": dict(bounds),
        "readers": {name: asdict(reading) for name, reading in readings.items()},
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    write_whole(folder / VERIFICATION_FILE, json.dumps(record, indent=2) + "\n")
