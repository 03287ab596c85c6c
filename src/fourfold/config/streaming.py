"""What does not go with a training set that is streamed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from fourfold.config.methods import PREFERENCE_METHODS

if TYPE_CHECKING:
    from fourfold.config.run import RunConfig

__all__ = ["STREAMING_BUFFER_SIZE", "streaming_contradictions"]

STREAMING_BUFFER_SIZE = 10_000
"""Rows of a block where nothing else is said."""


def streaming_contradictions(config: RunConfig) -> Iterator[tuple[tuple[str, ...], str, str]]:
    """The keys, what is wrong with them, and what to do."""
    if not config.streaming:
        if config.streaming_buffer_size != STREAMING_BUFFER_SIZE:
            yield (
                ("streaming_buffer_size", "streaming"),
                "streaming_buffer_size is given, and nothing is streamed",
                "set streaming: true, or leave streaming_buffer_size out",
            )
        return
    if config.max_steps is None:
        yield (
            ("streaming", "max_steps"),
            "streaming: true reads rows as they come, and how many there are, an epoch, is not known",
            "give max_steps; a stream that ends before begins again, in another order",
        )
    for key, is_set, why, hint in (
        (
            "eval_split_fraction",
            config.eval_split_fraction > 0,
            "holds out a share of rows whose number is not known",
            "give eval_dataset",
        ),
        ("group_by_length", config.group_by_length, "sorts rows that must be there before", "leave it out, or pack"),
        (
            "dataset_num_proc",
            config.dataset_num_proc is not None,
            "tokenizes rows before training",
            "leave it out; dataloader_num_workers: 1 reads and tokenizes ahead, in a process of its own",
        ),
        (
            "dataloader_num_workers",
            config.dataloader_num_workers > 1,
            "above 1 would read a stream several times",
            "give 1, or leave it out",
        ),
        (
            "method",
            config.method in PREFERENCE_METHODS,
            f"{config.method} compares rows that must be there before",
            "leave streaming out",
        ),
    ):
        if is_set:
            yield ("streaming", key), f"streaming: true is given, and {key} {why}", hint
