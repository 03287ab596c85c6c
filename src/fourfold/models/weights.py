"""The original weights of a model, read one by one from its safetensors."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from fourfold.errors import AdapterError, CheckpointError

__all__ = ["OriginalWeights"]


class OriginalWeights:
    """Weights by module name; each call reads one tensor and keeps none.

    Args:
        folder: A checkpoint: `model.safetensors`, or shards with `model.safetensors.index.json`.

    Raises:
        CheckpointError: No safetensors there.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            self._files = dict(json.loads(index.read_text())["weight_map"])
        elif (self.folder / "model.safetensors").is_file():
            with safe_open(self.folder / "model.safetensors", "pt") as file:
                self._files = dict.fromkeys(file.keys(), "model.safetensors")
        else:
            raise CheckpointError(
                f"no 16-bit weights in {self.folder}", allowed="model.safetensors, or shards with their index"
            )

    def __call__(self, module_name: str) -> Tensor:
        """The weight of the module, as stored."""
        key = f"{module_name}.weight"
        if key not in self._files:
            raise AdapterError(
                f"{key} is not in {self.folder}",
                hint="this initialisation needs a 16-bit checkpoint whose names are the model's own",
            )
        with safe_open(self.folder / self._files[key], "pt") as file:
            tensor: Tensor = file.get_tensor(key)
        if not tensor.is_floating_point():
            raise AdapterError(f"{key} in {self.folder} is quantized", hint="give the original 16-bit checkpoint")
        return tensor
