"""A run that goes on as if it had not been stopped: what is summed up between two logs, and the order of rows.

running_0.json    one a process: each sum by name, a number or {"dtype": ..., "value": ...} of a scalar tensor
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import SFTTrainer

from fourfold.training.batches import LengthGrouped
from fourfold.training.tally import Tally

__all__ = ["RunsOn", "load_running", "save_running"]

# The Trainer's own sums.
_SUMMED = ("_tr_loss", "_globalstep_last_logged", "_total_loss_scalar")

Sums = Mapping[str, Tensor | float]


def save_running(folder: Path, process_index: int, sums: Sums) -> None:
    """Write sums, numbers or scalar tensors, exactly."""
    record: dict[str, Any] = {}
    for name, value in sums.items():
        if isinstance(value, Tensor):
            record[name] = {"dtype": str(value.dtype).removeprefix("torch."), "value": value.item()}
        else:
            record[name] = value
    (folder / f"running_{process_index}.json").write_text(json.dumps(record) + "\n")


def load_running(folder: Path, process_index: int, num_processes: int, device: torch.device) -> dict[str, Any]:
    """What `save_running` wrote, of the same types; nothing where a checkpoint has none.

    Where the run had another number of processes, what a log sums up over all of them is the main one's alone.
    """
    number = len(list(folder.glob("running_*.json")))
    if number == 0:
        return {}
    if number == num_processes:
        return _read(folder, process_index, device)
    each = [_read(folder, index, device) for index in range(number)]
    merged = {name: each[0][name] for name in _SUMMED if name in each[0]}
    if "_tr_loss" in merged:
        # The Trainer's, which a log takes the mean of.
        merged["_tr_loss"] = torch.stack([sums["_tr_loss"] for sums in each]).mean()
    if process_index == 0:
        # A process has counted what its own rows had.
        names = {name for sums in each for name in sums if name not in _SUMMED}
        merged |= {name: sum(sums.get(name, 0) for sums in each) for name in sorted(names)}
    return merged


def _read(folder: Path, process_index: int, device: torch.device) -> dict[str, Any]:
    record = json.loads((folder / f"running_{process_index}.json").read_text())
    return {
        name: torch.tensor(value["value"], dtype=getattr(torch, value["dtype"]), device=device)
        if isinstance(value, dict)
        else value
        for name, value in record.items()
    }


class RunsOn(SFTTrainer):
    """What `FourfoldTrainer` does so that a log after a checkpoint is that of the run which was not stopped."""

    _tallies: dict[str, Tally]
    _sums_before: tuple[int, dict[str, Tensor | float]] | None = None

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        self._sums_before = (self.state.global_step, self.running_sums())
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        return batches, num_items

    def give_up_step(self) -> None:
        """Forget what a step that does not end has added to the sums."""
        if self._sums_before is not None and self._sums_before[0] == self.state.global_step:
            self.run_on(self._sums_before[1])

    def running_sums(self) -> dict[str, Tensor | float]:
        """What is summed up since the last log, as it is now."""
        sums = {name: getattr(self, name) for name in _SUMMED} | self._tallies["train"].sums()
        # The Trainer adds to its own in place.
        return {name: value.clone() if isinstance(value, Tensor) else value for name, value in sums.items()}

    def run_on(self, sums: dict[str, Any]) -> None:
        """Go on from a checkpoint's `running_sums`; the first step follows."""
        for name in _SUMMED:
            setattr(self, name, sums.get(name, getattr(self, name)))
        fields = vars(Tally())
        self._tallies["train"] = Tally(**{name: sums[name] for name in fields if name in sums})

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Any:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if self.args.train_sampling_strategy != "group_by_length" or not isinstance(rows, Dataset):
            return super()._get_train_sampler(train_dataset)
        return LengthGrouped(rows, self.args.train_batch_size * self.args.gradient_accumulation_steps, self.args.seed)
