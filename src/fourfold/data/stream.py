"""Rows that are read, shuffled, tokenized and packed while they are trained on, and can be gone on with exactly.

    sources (datasets) ── drawn from by weight ── blocks of rows ── shuffled, tokenized, packed ── rows

Only one block is in memory. Within a block everything follows from the seed, the epoch and the block's number, so that
a position is where the block began in the sources (the state of `datasets.IterableDataset`) and how many rows of it
were given. A buffer that is refilled row by row would mix further, but its content would have to be kept: `datasets`
loses it when its own shuffled streams are resumed.
"""

from __future__ import annotations

import copy
import itertools
import json
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import datasets
import numpy as np
import torch

from fourfold.data.encoding import BatchEncoder
from fourfold.data.mixture import STOPPING_STRATEGIES, check_weights, options_of
from fourfold.data.options import DataOptions
from fourfold.data.packing import best_fit
from fourfold.data.report import at
from fourfold.data.row_formats import ROW_FORMATS, RowFormat, detect_row_format, map_columns
from fourfold.data.sources import UNREADABLE, DataSource, local_files, stream_rows
from fourfold.data.templates import check_tokenizer, num_supervised
from fourfold.errors import CheckpointError, ConfigError, DataError

__all__ = ["RowStream"]

_KEPT_POSITIONS = 4


@dataclass(frozen=True)
class _Part:
    source: DataSource
    rows: datasets.IterableDataset
    row_format: RowFormat
    options: DataOptions


class _Place(TypedDict):
    """Where a source is: the state of `datasets`, its rows so far, how often it came to its end."""

    state: dict[str, Any] | None
    rows: int
    ended: int


@dataclass(frozen=True)
class _Position:
    """Where a block begins: in each source, among the blocks, among the rows given, and after what was left out."""

    sources: list[_Place]
    block: int
    rows: int
    dropped: dict[str, int]


class RowStream(torch.utils.data.IterableDataset[dict[str, Any]]):
    """Rows of `input_ids` and `labels` (packed: and `seq_lengths`), one epoch an iteration, in constant memory.

    Attributes:
        epoch: The epoch that is given, or comes next; it decides the order.
        dropped: Rows left out so far, by reason: "overlong", "unlearned", "empty".
    """

    def __init__(
        self,
        sources: Sequence[DataSource],
        tokenizer: Any,
        options: DataOptions,
        *,
        buffer_size: int = 10_000,
        seed: int = 42,
        stopping_strategy: str = "all_exhausted",
    ) -> None:
        """
        Args:
            sources: Data sets; several are put end to end, or interleaved by weight.
            tokenizer: As in `prepare`.
            options: As in `prepare`.
            buffer_size: Rows that are shuffled and packed together: one block.
            seed: Of the order.
            stopping_strategy: As in `prepare_mixture`.

        Raises:
            ConfigError: A value that is not allowed.
            DataError: A source that is not there, or whose rows are of no known format.
        """
        super().__init__()
        if buffer_size < 1:
            raise ConfigError("key streaming_buffer_size", found=buffer_size, allowed="at least 1")
        if stopping_strategy not in STOPPING_STRATEGIES:
            raise ConfigError("key stopping_strategy", found=stopping_strategy, allowed=STOPPING_STRATEGIES)
        self._tokenizer, self._options = tokenizer, options
        self._buffer_size, self._seed, self._stopping_strategy = buffer_size, seed, stopping_strategy
        self._shares = check_weights(sources)
        self._parts = [_recognised(source, options_of(source, options)) for source in sources]
        for part in self._parts:
            check_tokenizer(tokenizer, kind=part.row_format.kind)
        self._encoders = [
            BatchEncoder(tokenizer, part.row_format, part.options, part.source.path) for part in self._parts
        ]
        self.epoch = 0
        self.dropped: Counter[str] = Counter()
        self._begin = self._start()
        self._given = 0
        self._positions: deque[_Position] = deque([self._begin], maxlen=_KEPT_POSITIONS)

    def _start(self) -> _Position:
        return _Position([_Place(state=None, rows=0, ended=0) for _ in self._parts], 0, 0, dict(self.dropped))

    @property
    def told_by(self) -> list[str]:
        """What the rows of each source were recognised as."""
        return [f"{part.source.path}: rows of {part.row_format.name}" for part in self._parts]

    @property
    def _order(self) -> dict[str, Any]:
        """What its order follows from beside the epoch, as JSON can write it."""
        options = ("max_length", "packing", "overlong", "train_on_prompt")
        sources = [part.source for part in self._parts]
        return {
            # By name: a data set that is somewhere else now is the same.
            "train_dataset": [[Path(source.path).name, source.split, source.weight] for source in sources],
            "seed": self._seed,
            "streaming_buffer_size": self._buffer_size,
            "stopping_strategy": self._stopping_strategy,
            **{key: getattr(self._options, key) for key in options},
        }

    def set_epoch(self, epoch: int) -> None:
        """Begin that epoch anew with the next iteration; nothing, if it is the one that is at hand."""
        if epoch != self.epoch:
            self._reset(epoch)

    def _reset(self, epoch: int) -> None:
        self.epoch = epoch
        self._begin, self._given = self._start(), 0
        self._positions = deque([self._begin], maxlen=_KEPT_POSITIONS)

    def state_dict(self, after: int | None = None) -> dict[str, Any]:
        """Where the stream is, as JSON can write it.

        Args:
            after: Rows of this epoch after which to go on, where whoever reads has read ahead; None: all that were
                given.

        Raises:
            ValueError: More rows than were given, or so many fewer that the place is not known any more.
        """
        given = self._given if after is None else after
        place = next((one for one in reversed(self._positions) if one.rows <= given), None)
        if place is None or given > self._given:
            raise ValueError(f"after = {given} lies outside of {self._positions[0].rows} to {self._given}")
        state = {"epoch": self.epoch, "sources": place.sources, "block": place.block, "dropped": place.dropped}
        rows = {"rows_before": place.rows, "given": given - place.rows}
        return copy.deepcopy({**state, **rows, "order": self._order})

    def load_state_dict(self, state: dict[str, Any] | None) -> None:
        """Go on from there with the next iteration: it gives the same rows as the stream that was not broken off.

        Args:
            state: What `state_dict` gave, of this stream or of one that was made alike; None: begin at the beginning.

        Raises:
            CheckpointError: The state of a stream whose rows come otherwise.
        """
        if state is None:
            self.dropped.clear()
            self._reset(0)
            return
        order = json.loads(json.dumps(self._order))
        if other := [key for key, value in order.items() if json.loads(json.dumps(state["order"])).get(key) != value]:
            raise CheckpointError(
                f"the place in the stream is of a run with another {', '.join(other)}",
                found=", ".join(f"{key}: {order[key]}" for key in other),
                allowed=", ".join(f"{key}: {state['order'].get(key)}" for key in other),
                hint="resume with the values that the run began with, or start anew",
            )
        self._reset(state["epoch"])
        dropped = dict(state["dropped"])
        self._begin = _Position(copy.deepcopy(state["sources"]), state["block"], state["rows_before"], dropped)
        self._positions[0] = self._begin
        self._given = state["rows_before"] + state["given"]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        if torch.utils.data.get_worker_info() is not None:
            raise ConfigError(
                "a stream is read in the main process, whose position a checkpoint keeps",
                found="dataloader_num_workers above 0",
                allowed="dataloader_num_workers: 0",
            )
        return self.rows()

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows of this epoch from here on; also for a process whose place another one is told."""
        begin, skipped = self._begin, self._given - self._begin.rows
        self._given = begin.rows
        self.dropped = Counter(begin.dropped)
        self._positions = deque([begin], maxlen=_KEPT_POSITIONS)
        cursors = [_Cursor(part, copy.deepcopy(place)) for part, place in zip(self._parts, begin.sources, strict=True)]
        for block in itertools.count(begin.block):
            if block > begin.block:
                places = [cursor.place() for cursor in cursors]
                self._positions.append(_Position(places, block, self._given, dict(self.dropped)))
            generator = np.random.default_rng((self._seed, self.epoch, block))
            taken = list(itertools.islice(self._drawn(cursors, generator), self._buffer_size))
            if not taken:
                break
            for row in self._block(taken, generator):
                self._given += 1
                if skipped:
                    skipped -= 1
                else:
                    # Counted before it is given: whoever has it may ask for the state.
                    yield row
        self._reset(self.epoch + 1)

    def _drawn(self, cursors: list[_Cursor], generator: np.random.Generator) -> Iterator[_Row]:
        """Rows from here to the end of the epoch; the state is in the cursors alone."""
        if self._shares is None:
            for place, cursor in enumerate(cursors):
                while not cursor.ended and (row := cursor.next()) is not None:
                    yield _Row(place, *row)
            return
        repeats = self._stopping_strategy == "all_exhausted"
        ends = any if self._stopping_strategy == "first_exhausted" else all
        while not ends(cursor.ended > 0 for cursor in cursors):
            shares = np.asarray(self._shares) * [repeats or not cursor.ended for cursor in cursors]
            place = int(generator.choice(len(cursors), p=shares / shares.sum()))
            row = cursors[place].next()
            if row is None and repeats and not all(cursor.ended for cursor in cursors):
                row = cursors[place].next()
            if row is not None:
                yield _Row(place, *row)

    def _block(self, taken: list[_Row], generator: np.random.Generator) -> list[dict[str, Any]]:
        encoded: list[dict[str, Any]] = []
        for place, part in enumerate(self._parts):
            its_rows = [row for row in taken if row.part == place]
            if not its_rows:
                continue
            numbers = [row.number for row in its_rows]
            columns = self._encoders[place].encode([row.values for row in its_rows], numbers)
            self.dropped["empty"] += len(set(numbers)) - len(set(columns["row_number"]))
            for input_ids, labels, number in zip(
                columns["input_ids"], columns["labels"], columns["row_number"], strict=True
            ):
                row = {"input_ids": input_ids, "labels": labels}
                if fitting := self._fitting(row, f"data set {part.source.path}, row {number}"):
                    encoded.append(fitting)
        order = generator.permutation(len(encoded))
        if not self._options.packing or not encoded:
            return [encoded[place] for place in order]
        lengths = np.asarray([len(encoded[place]["input_ids"]) for place in order])
        documents, num_documents = best_fit(lengths, self._options.max_length)
        ends = num_documents.cumsum()[:-1]
        rows = [_joined([encoded[place] for place in its_places]) for its_places in np.split(order[documents], ends)]
        # Best fit decreasing sorts by length.
        return [rows[place] for place in generator.permutation(len(rows))]

    def _fitting(self, row: dict[str, Any], where: str) -> dict[str, Any] | None:
        if len(row["input_ids"]) > self._options.max_length:
            if self._options.overlong == "error":
                raise DataError(
                    f"{where} is longer than max_length = {self._options.max_length}",
                    found=f"{len(row['input_ids'])} tokens",
                    hint="raise max_length, or set overlong to drop or truncate",
                )
            self.dropped["overlong"] += 1
            if self._options.overlong == "drop":
                return None
            row = {key: values[: self._options.max_length] for key, values in row.items()}
        if num_supervised(row["labels"]) == 0:
            self.dropped["unlearned"] += 1
            return None
        return row


def _joined(documents: list[dict[str, Any]]) -> dict[str, Any]:
    joined = {key: list(itertools.chain(*(one[key] for one in documents))) for key in ("input_ids", "labels")}
    return joined | {"seq_lengths": [len(one["input_ids"]) for one in documents]}


class _Row(NamedTuple):
    """A row as it was read: of which part, its number there, its values."""

    part: int
    number: int
    values: dict[str, Any]


class _Cursor:
    """A source that is read row by row from a place, and again from its beginning when it has ended."""

    def __init__(self, part: _Part, place: _Place) -> None:
        self._part, self._rows, self.ended = part, place["rows"], place["ended"]
        self._open(place["state"])

    def _open(self, state: dict[str, Any] | None) -> None:
        self._stream = copy.deepcopy(self._part.rows)
        if state is not None:
            self._stream.load_state_dict(state)
        self._is_begun = state is not None
        self._iterator = iter(self._stream)

    def place(self) -> _Place:
        """Where it is, to go on from."""
        state = copy.deepcopy(self._stream.state_dict()) if self._is_begun else None
        return _Place(state=state, rows=self._rows, ended=self.ended)

    def next(self) -> tuple[int, dict[str, Any]] | None:
        """The next row and its number; None at the end, after which it stands at the beginning."""
        try:
            values = next(self._iterator, None)
        except UNREADABLE as error:
            raise _unreadable(self._part.source, error) from error
        if values is None:
            self.ended += 1
            self._rows = 0
            self._open(None)
            return None
        self._is_begun = True
        self._rows += 1
        for key, column in (self._part.options.columns or {}).items():
            values[key] = values.get(column)
        return self._rows, values


def _unreadable(source: DataSource, error: Exception) -> DataError:
    local_files(source, check=True)
    return DataError(f"data set {source.path} cannot be read", found=error)


def _recognised(source: DataSource, options: DataOptions) -> _Part:
    rows = stream_rows(source)
    try:
        first: dict[str, Any] | None = next(iter(copy.deepcopy(rows)), None)
    except UNREADABLE as error:
        raise _unreadable(source, error) from error
    if first is None:
        raise DataError(f"data set {source.path} is empty", found="0 rows", allowed="at least one row")
    columns = list(first)
    try:
        if options.columns:
            renamed = map_columns(columns, options.columns)
            kept = [column for column in columns if column not in renamed and column not in renamed.values()]
            columns = [*kept, *renamed.values()]
        row_format = ROW_FORMATS[options.row_format] if options.row_format else detect_row_format(columns)
    except DataError as error:
        raise at(f"data set {source.path}", error) from None
    if row_format.kind not in ("conversation", "document"):
        raise DataError(
            f"data set {source.path}: {row_format.name} rows are compared, and cannot be streamed",
            hint="leave streaming out",
        )
    return _Part(source, rows, row_format, options)
