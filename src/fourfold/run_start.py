"""How a run starts: it takes its folder, goes on from a checkpoint there, or clears what an earlier run left."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from fourfold.config import RunConfig, load_config
from fourfold.config.methods import training_contradictions
from fourfold.config.resuming import Resumption, changes
from fourfold.errors import CheckpointError, ConfigError
from fourfold.files import clear_leftovers
from fourfold.inputs import BASE_FOLDER
from fourfold.training import run_folder
from fourfold.training.checkpoint import find_checkpoint, list_checkpoints
from fourfold.training.processes import processes
from fourfold.training.streamed import place_in_stream

__all__ = ["claim_output_dir", "clear_former_run", "going_on", "resumption"]


def claim_output_dir(config: RunConfig) -> tuple[Path, Path | None]:
    """The run folder and the checkpoint to resume from, if any; a run that is there already is left as it is.

    Raises:
        ConfigError: The folder holds a run that is neither resumed nor overwritten, or is a file; or nothing to train
            on is given.
        CheckpointError: The checkpoint to resume from is missing or not whole.
    """
    for contradiction in training_contradictions(config):
        raise ConfigError(contradiction.what, hint=contradiction.hint)
    output = Path(config.output_dir)
    if output.exists() and not output.is_dir():
        raise ConfigError(f"output_dir {output} is a file", allowed="a folder, or a name that is free")
    holds_run = (output / run_folder.METRICS_FILE).exists() or bool(list_checkpoints(output))
    if holds_run and config.resume_from_checkpoint is None and not config.overwrite_output_dir:
        raise ConfigError(
            f"output_dir {output} holds a run already",
            hint="go on with --resume_from_checkpoint auto, start anew with --overwrite_output_dir, or name another",
        )
    if config.train_dataset is None:
        raise ConfigError("train_dataset is not given", hint="name a file, a folder, or a data set on the hub")
    if output.is_dir() and processes().is_main:
        clear_leftovers(output, _is_written_whole)
    return output, find_checkpoint(output, config.resume_from_checkpoint)


def _is_written_whole(name: str) -> bool:
    files = (run_folder.CONFIG_FILE, run_folder.METRICS_FILE, BASE_FOLDER, *run_folder.RESULTS, *run_folder.RECORDS)
    return name in files or re.fullmatch(r"checkpoint-\d+", name) is not None


def going_on(config: RunConfig, checkpoint: Path | None) -> RunConfig:
    """The configuration with what a run that goes on from a checkpoint cannot change: where `optim` is null, the
    optimizer that the checkpoint's run began with.

    Raises:
        CheckpointError: The run streamed its rows, and the configuration does not.
    """
    if checkpoint is not None and not config.streaming and place_in_stream(checkpoint) is not None:
        raise CheckpointError(
            f"{checkpoint} is of a run whose rows were streamed",
            allowed="streaming: true",
            hint="resume with the data that the run began with, or start anew",
        )
    if checkpoint is None or config.optim is not None:
        return config
    begun = checkpoint.parent / run_folder.CONFIG_FILE
    return config.model_copy(update={"optim": load_config(begun.parent).optim}) if begun.is_file() else config


def resumption(config: RunConfig, checkpoint: Path | None) -> Resumption | None:
    """What is another than when the run began that goes on from a checkpoint; None where none does.

    Raises:
        ConfigError: Something that cannot change.
    """
    if checkpoint is None:
        return None
    begun = checkpoint.parent / run_folder.CONFIG_FILE
    changed = changes(load_config(begun.parent), config, begun) if begun.is_file() else []
    return Resumption(str(checkpoint), changed)


def clear_former_run(output: Path) -> None:
    """Delete what an earlier run left: its checkpoints would outrank the new ones, its base belongs to its adapter."""
    for folder in [*list_checkpoints(output), output / BASE_FOLDER, *(output / name for name in run_folder.RESULTS)]:
        if folder.is_dir():
            shutil.rmtree(folder)
    files = (run_folder.METRICS_FILE, run_folder.LOSS_PICTURE, run_folder.CARD_FILE, *run_folder.RECORDS)
    for name in files:
        (output / name).unlink(missing_ok=True)
