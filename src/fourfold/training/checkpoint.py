"""Checkpoints that are whole or absent, in safetensors and JSON alone.

    checkpoint-120/
      adapter_model.safetensors, adapter_config.json    PEFT's own format; or, where all of the model is trained,
      model*.safetensors, config.json                   Transformers' own format
      tokenizer.json, chat_template.jinja, ...          the tokenizer's own format
      optimizer.safetensors, optimizer.json             tensors; groups, scheduler, trained parameters
      rng_state_0.safetensors, rng_state_0.json         one pair a process
      running_0.json                                    one a process: what is summed up since the last log
      trainer_state.json                                step, epoch, log history, as the Trainer writes it; where rows
                                                        are streamed, the place in the stream
      base/                                             the quantized base, where the run changes it between checkpoints
      manifest.json                                     every file above with its size; written last

A checkpoint is written into a hidden sibling folder, synced to the disk and renamed. The Trainer's own format
holds pickles (optimizer.pt, rng_state.pth, training_args.bin); none is written here and none is read.
"""

from __future__ import annotations

import contextlib
import json
import logging
import random
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from fourfold.errors import CheckpointError
from fourfold.files import partial_path, whole_folder

__all__ = [
    "check_checkpoint",
    "checkpoint_path",
    "find_checkpoint",
    "list_checkpoints",
    "load_optimizer_state",
    "load_rng_state",
    "prune_checkpoints",
    "restore_weights",
    "save_optimizer_state",
    "save_rng_state",
    "shared_checkpoint",
    "whole_checkpoint",
    "write_manifest",
]

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
# Without these a checkpoint cannot be resumed, whatever its manifest says.
_REQUIRED = ("optimizer.safetensors", "optimizer.json", "trainer_state.json")
_WEIGHTS = ("adapter_model.safetensors", "adapter_config.json")
_PICKLE_SUFFIXES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})
_CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)")
_EARLIER = "resume from an earlier checkpoint, or start anew"


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of optimizer step `step` stands; the Trainer knows it by the same name."""
    return output_dir / f"checkpoint-{step}"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoint folders in `output_dir`, oldest step first, whole or not."""
    if not output_dir.is_dir():
        return []
    folders = [path for path in output_dir.iterdir() if path.is_dir() and _CHECKPOINT_NAME.fullmatch(path.name)]
    return sorted(folders, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def prune_checkpoints(output_dir: Path, keep: int, best: str | None = None) -> None:
    """Delete all but `keep` checkpoints: the newest ones, of which one gives way to the best where it is older.

    The newest and the best stay in any case.
    """
    checkpoints = list_checkpoints(output_dir)
    kept = checkpoints[-keep:]
    older = [path for path in checkpoints[:-keep] if best is not None and path == Path(best)]
    if older:
        kept = kept[-max(keep - 1, 1) :] + older
    for path in checkpoints:
        if path not in kept:
            shutil.rmtree(path)


@contextlib.contextmanager
def whole_checkpoint(path: Path) -> Iterator[Path]:
    """`whole_folder`, which on a full disk also says what a checkpoint takes and where to resume from."""
    earlier = list_checkpoints(path.parent)
    hint = "free some space and resume"
    if earlier:
        size = sum(file.stat().st_size for file in earlier[-1].rglob("*") if file.is_file())
        hint = f"a checkpoint takes about {size:,} bytes; free that much and resume from {earlier[-1]}"
    with whole_folder(path, hint=hint) as partial:
        yield partial


@contextlib.contextmanager
def shared_checkpoint(path: Path, accelerator: Any, *, is_main: bool) -> Iterator[Path]:
    """The main process's `whole_checkpoint`, into which the others write too; accelerate keeps them together."""
    if not is_main:
        accelerator.wait_for_everyone()
        yield partial_path(path)
        return
    with whole_checkpoint(path) as partial:
        accelerator.wait_for_everyone()
        yield partial


def write_manifest(folder: Path) -> None:
    """Record the size in bytes of every file in `folder`; to be called when all are written."""
    files = {str(file.relative_to(folder)): file.stat().st_size for file in folder.rglob("*") if file.is_file()}
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")


def check_checkpoint(path: Path) -> None:
    """Make sure that a checkpoint is whole and holds no pickle.

    Raises:
        CheckpointError: Naming the file that is missing, cut short or refused.
    """
    if not path.is_dir():
        found = ", ".join(other.name for other in list_checkpoints(path.parent)) or "no checkpoint there"
        raise CheckpointError(f"There is no checkpoint at {path}", found=found)
    for file in sorted(path.rglob("*")):
        if file.suffix in _PICKLE_SUFFIXES:
            raise CheckpointError(
                f"{file} is a pickle, which can run any code when it is loaded; it is refused",
                allowed="checkpoints in safetensors, as this program writes them",
            )
    manifest = path / MANIFEST
    if not manifest.is_file():
        raise CheckpointError(f"{path} is not whole: {manifest} is missing", hint=_EARLIER)
    try:
        sizes: dict[str, int] = json.loads(manifest.read_text())["files"]
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{manifest} cannot be read", found=error) from error
    # Of a whole model, the manifest names every shard.
    weights = () if "config.json" in sizes else _WEIGHTS
    for name in sorted({*sizes, *_REQUIRED, *weights}):
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} is not whole: {file} is missing", hint=_EARLIER)
        if name in sizes and file.stat().st_size != sizes[name]:
            raise CheckpointError(
                f"{path} is not whole: {file} is not as it was written",
                found=f"{file.stat().st_size:,} bytes",
                allowed=f"{sizes[name]:,} bytes",
                hint=_EARLIER,
            )


def find_checkpoint(output_dir: Path, resume_from_checkpoint: str | Path | None) -> Path | None:
    """The checkpoint to resume from.

    Args:
        resume_from_checkpoint: None to start anew; "auto" for the newest whole checkpoint in `output_dir`,
            or a start anew where there is none at all; else the path of one.

    Raises:
        CheckpointError: The one asked for is missing, not whole or a pickle; or, for "auto", all are.
    """
    if resume_from_checkpoint is None:
        return None
    if resume_from_checkpoint != "auto":
        path = Path(resume_from_checkpoint)
        check_checkpoint(path)
        return path
    fault: CheckpointError | None = None
    for path in reversed(list_checkpoints(output_dir)):
        try:
            check_checkpoint(path)
        except CheckpointError as error:
            logger.warning("Passing over %s: %s", path, error)
            fault = fault or error
        else:
            return path
    if fault is not None:
        raise fault
    return None


def save_optimizer_state(
    folder: Path,
    optimizer: dict[str, Any],
    scheduler: dict[str, Any],
    trainable: Mapping[str, torch.Size],
    scaler: torch.amp.GradScaler | None = None,
    names: Sequence[Sequence[str]] | None = None,
) -> None:
    """Write the optimizer's and the scheduler's state as safetensors and JSON.

    Args:
        optimizer, scheduler: Their `state_dict()`.
        trainable: Name and shape of each trained parameter, in the order of the optimizer's.
        scaler: What scales the loss; None: nothing.
        names: Those of the parameters of each of the optimizer's groups.
    """
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, dict[str, Any]] = {}
    for index, state in optimizer["state"].items():
        for name, value in state.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{index}.{name}"] = value.contiguous()
            else:
                plain.setdefault(str(index), {})[name] = value
    save_file(tensors, folder / "optimizer.safetensors")
    record = {
        "param_groups": optimizer["param_groups"],
        "names": names,
        "state": plain,
        "scheduler": scheduler,
        "trainable": {name: list(shape) for name, shape in trainable.items()},
        "scaler": None if scaler is None else scaler.state_dict(),
    }
    (folder / "optimizer.json").write_text(json.dumps(record))


def load_optimizer_state(
    folder: Path, trainable: Mapping[str, torch.Size], scaler: torch.amp.GradScaler | None = None
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The state dicts that `save_optimizer_state` wrote, tensors on the CPU: (optimizer with its `names`, scheduler).

    Args:
        folder: The checkpoint.
        trainable: As there.
        scaler: Given the scale at which the checkpoint was written, if it was with one.

    Raises:
        CheckpointError: The files cannot be read, or were written for other trained parameters.
    """
    tensors, record = _load_pair(folder, "optimizer")
    expected = {name: list(shape) for name, shape in trainable.items()}
    if list(record["trainable"].items()) != list(expected.items()):
        pairs = zip(record["trainable"].items(), expected.items(), strict=False)
        first = next(((a, b) for a, b in pairs if a != b), None)
        raise CheckpointError(
            f"{folder} was written for other adapters than this model has",
            found=f"{first[0][0]} {first[0][1]}" if first else f"{len(record['trainable'])} parameters",
            allowed=f"{first[1][0]} {first[1][1]}" if first else f"{len(expected)} parameters",
            hint="resume with the LoRA rank and targets that the run began with",
        )
    if scaler is not None and record.get("scaler"):
        scaler.load_state_dict(record["scaler"])
    state: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in record["state"].items()}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        state.setdefault(int(index), {})[name] = tensor
    read = {"state": state, "param_groups": record["param_groups"], "names": record.get("names")}
    return read, record["scheduler"]


def restore_weights(model: PreTrainedModel, folder: Path) -> None:
    """Give a model of which all is trained the weights of its checkpoint, bit for bit.

    They are read as a model of its own on the CPU: a checkpoint's tensors need not have the names and shapes of the
    parameters (experts are saved one by one).

    Raises:
        CheckpointError: The folder holds another model.
    """
    saved = type(model).from_pretrained(str(folder), dtype="auto", use_safetensors=True)
    sources = dict(saved.named_parameters()) | dict(saved.named_buffers())
    targets = dict(model.named_parameters()) | dict(model.named_buffers())
    for name, target in targets.items():
        source = sources.get(name)
        if source is None or source.shape != target.shape or source.dtype != target.dtype:
            raise CheckpointError(
                f"{folder} holds another model than the one that is trained",
                found=f"{name}: {None if source is None else f'{source.dtype}, {list(source.shape)}'}",
                allowed=f"{target.dtype}, {list(target.shape)}",
            )
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(sources[name])


def save_rng_state(folder: Path, process_index: int) -> None:
    """Write the states of Python's, NumPy's and torch's random number generators of this process."""
    version, words, gauss = random.getstate()
    algorithm, keys, position, has_gauss, cached = np.random.get_state()
    tensors = {"cpu": torch.random.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    save_file(tensors, folder / f"rng_state_{process_index}.safetensors")
    record = {
        "python": [version, words, gauss],
        "numpy": [algorithm, np.asarray(keys).tolist(), position, has_gauss, cached],
    }
    (folder / f"rng_state_{process_index}.json").write_text(json.dumps(record))


def load_rng_state(folder: Path, process_index: int) -> None:
    """Set the random number generators of this process as `save_rng_state` found them."""
    tensors, record = _load_pair(folder, f"rng_state_{process_index}")
    version, words, gauss = record["python"]
    random.setstate((version, tuple(words), gauss))
    algorithm, keys, position, has_gauss, cached = record["numpy"]
    np.random.set_state((algorithm, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.random.set_rng_state(tensors["cpu"])
    if "cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["cuda"])


def _load_pair(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    tensors_file, record_file = folder / f"{name}.safetensors", folder / f"{name}.json"
    try:
        return load_file(tensors_file), json.loads(record_file.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"{folder} is not whole: {error.filename or tensors_file} is missing") from error
    except SafetensorError as error:
        raise CheckpointError(f"{tensors_file} cannot be read", found=error) from error
    except ValueError as error:
        raise CheckpointError(f"{record_file} cannot be read", found=error) from error
