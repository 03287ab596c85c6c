"""Training on rows that are read while it goes on, and going on with exactly the next one.

Each batch carries the stream's place behind it, so that batches that were read ahead, here or in a process of their
own, are neither lost nor given twice: a checkpoint keeps the place behind the last batch of its last step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from datasets import Dataset
from peft import PeftModel
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_utils import TrainOutput

from fourfold.errors import CheckpointError, ConfigError, DataError
from fourfold.training.batches import Collator, require_labels
from fourfold.training.building import trainer_arguments
from fourfold.training.checkpoint import find_checkpoint
from fourfold.training.options import TrainingOptions
from fourfold.training.trainer import FourfoldTrainer

__all__ = ["Stream", "StreamedBatches", "StreamedTrainer", "build_streamed_trainer", "place_in_stream"]

READ_AHEAD = 64
"""Batches that a process of its own is ahead."""

_PLACE = "place_in_stream"
"""Key of a batch, and of `stateful_callbacks` in trainer_state.json."""


class Stream(Protocol):
    """What is read from: `fourfold.data.stream.RowStream`."""

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of this epoch from its place on; afterwards it is at the beginning of the next."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The place behind the last row that was given, as JSON can write it."""
        ...

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from a place; None: from the beginning."""
        ...


class StreamedBatches(IterableDataset[dict[str, Any]]):
    """Batches of a stream without end: epoch after epoch, each in another order.

    Of each `batch_size * num_processes` rows this process takes every `num_processes`-th, so that all processes are at
    the same place and have equally many batches.

    Attributes:
        begin: The place to begin at with the next iteration; None: the beginning.
    """

    def __init__(
        self, stream: Stream, collate: Collator, batch_size: int, process_index: int = 0, num_processes: int = 1
    ) -> None:
        """
        Args:
            stream: Where rows come from.
            collate: Makes a batch of rows.
            batch_size: Rows of a batch of one process.
            process_index: Which process this is.
            num_processes: How many there are.
        """
        super().__init__()
        self._stream, self._collate, self._batch_size = stream, collate, batch_size
        self._process_index, self._num_processes = process_index, num_processes
        self.begin: dict[str, Any] | None = None

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        if worker is not None and worker.num_workers > 1:
            raise ConfigError(
                "a stream is read by one process, which reads ahead",
                found=f"dataloader_num_workers: {worker.num_workers}",
                allowed="dataloader_num_workers: 0 or 1",
            )
        self._stream.load_state_dict(self.begin)
        rows: list[dict[str, Any]] = []
        num_empty = 0
        # The rest of an epoch is empty where the place was at its very end.
        while num_empty < 2:
            num_empty += 1
            for row in self._stream.rows():
                num_empty = 0
                rows.append(row)
                if len(rows) == self._batch_size * self._num_processes:
                    batch = self._collate(rows[self._process_index :: self._num_processes])
                    yield {**batch, _PLACE: self._stream.state_dict()}
                    rows = []
        raise DataError("the stream has no row that can be learned from", found="an epoch without one")


class StreamedTrainer(FourfoldTrainer):
    """The trainer for a stream; `train_dataset` holds a few rows that are only looked at."""

    def __init__(self, *args: Any, stream: Stream, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.args.max_steps <= 0:
            raise ConfigError("how many rows a stream has is not known", hint="give max_steps")
        # The place says where to go on; there is nothing to be skipped.
        self.args.ignore_data_skip = True
        self._batches = StreamedBatches(
            stream,
            self.data_collator,
            self.args.train_batch_size,
            process_index=self.args.process_index,
            num_processes=self.args.world_size,
        )
        # By the number of optimizer steps before it.
        self._places: dict[int, dict[str, Any] | None] = {}

    def get_train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Batches by themselves: accelerate would deal them out again among the processes."""
        return DataLoader(
            self._batches,
            batch_size=None,
            num_workers=self.args.dataloader_num_workers,
            # A block of rows is tokenized at once: enough batches to train on meanwhile.
            prefetch_factor=READ_AHEAD if self.args.dataloader_num_workers else None,
            pin_memory=self.args.dataloader_pin_memory,
            # Of its own: a seed is drawn from it, and the global one has to be as it was in the checkpoint.
            generator=torch.Generator(),
        )

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> tuple[list[Any], Any]:
        batches, num_items = super().get_batch_samples(*args, **kwargs)
        places = [batch.pop(_PLACE) for batch in batches]
        step = self.state.global_step
        self._places = {step: self._places.get(step), step + 1: places[-1]}
        return batches, num_items

    def train(self, resume_from_checkpoint: str | Path | None = None, **kwargs: Any) -> TrainOutput:
        """As `FourfoldTrainer.train`. Raises CheckpointError for a checkpoint of rows that were not streamed."""
        resume = find_checkpoint(Path(self.args.output_dir), resume_from_checkpoint)
        self._batches.begin = None if resume is None else place_in_stream(resume)
        if resume is not None and self._batches.begin is None:
            raise CheckpointError(
                f"{resume} is of a run whose rows were not streamed",
                allowed="streaming: false",
                hint="resume with the data that the run began with, or start anew",
            )
        return super().train(resume_from_checkpoint=resume, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As `FourfoldTrainer.log`; the epoch is that of the stream, in whole numbers: its length is not known."""
        place = self._places.get(self.state.global_step) or self._batches.begin
        self.state.epoch = float(place["epoch"]) if place else 0.0
        if place and "loss" in logs and (dropped := sum(place["dropped"].values())):
            logs["rows_dropped"] = dropped
        super().log(logs, start_time)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        place = self._places.get(self.state.global_step) or self._batches.begin
        self.state.stateful_callbacks[_PLACE] = place
        super()._save_checkpoint(*args, **kwargs)


def place_in_stream(checkpoint: Path) -> dict[str, Any] | None:
    """The place in the stream that a checkpoint goes on from; None: its rows were not streamed."""
    state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    place: dict[str, Any] | None = state.get("stateful_callbacks", {}).get(_PLACE)
    return place


def build_streamed_trainer(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    stream: Stream,
    first_rows: Dataset,
    eval_dataset: Dataset | None,
    collator: Callable[[list[dict[str, Any]]], dict[str, Any]],
    options: TrainingOptions,
    callbacks: Sequence[TrainerCallback] = (),
) -> StreamedTrainer:
    """A trainer for a stream of rows that are tokenized and masked; see `fourfold.training.building.build_trainer`.

    Args:
        stream: The rows.
        first_rows: A few of them, which are looked at and not trained on.

    Raises:
        ConfigError: As `build_trainer`; or `max_steps` is not given.
        DataError: As `build_trainer`.
    """
    for name, dataset in (("training", first_rows), ("evaluation", eval_dataset)):
        if dataset is not None:
            require_labels(name, dataset)
    arguments = trainer_arguments(model, tokenizer, first_rows, eval_dataset, collator, options, callbacks)
    return StreamedTrainer(stream=stream, **arguments)
