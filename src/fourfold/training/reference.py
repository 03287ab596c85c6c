"""The reference's log-probabilities of a run's pairs, in the run folder: a run that goes on has no other way to them.

reference.safetensors    "train" and "eval": fp32 [pairs, 2], the chosen and the rejected answer of each
"""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fourfold.errors import CheckpointError

__all__ = ["REFERENCE_FILE", "read_reference", "write_reference"]

REFERENCE_FILE = "reference.safetensors"


def write_reference(run_folder: Path, computed: dict[str, Tensor]) -> None:
    """Write it, whole or not at all."""
    partial = run_folder / f".{REFERENCE_FILE}"
    run_folder.mkdir(parents=True, exist_ok=True)
    save_file({name: values.contiguous() for name, values in computed.items()}, partial)
    partial.replace(run_folder / REFERENCE_FILE)


def read_reference(run_folder: Path, rows: dict[str, int]) -> dict[str, Tensor]:
    """The log-probabilities of `rows` many rows by name, each [rows, 2].

    Raises:
        CheckpointError: There are none, or they are those of other rows.
    """
    path = run_folder / REFERENCE_FILE
    hint = "the run's first model is needed for them: start anew, without resume_from_checkpoint"
    try:
        found = load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing: what the reference gave the rows", hint=hint) from None
    except SafetensorError as error:
        raise CheckpointError(f"{path} cannot be read", found=error, hint=hint) from error
    numbers = {name: len(found[name]) if name in found else 0 for name in rows}
    if numbers != rows:
        raise CheckpointError(f"{path} belongs to other rows", found=numbers, allowed=str(rows), hint=hint)
    return {name: found[name] for name in rows}
