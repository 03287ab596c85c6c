"""Passes over the sequences that run, of which one may begin before the tokens of the one before have been read.

A pass writes the token that was drawn last for each sequence, and draws the next. Both stay on the device: so a GPU
goes from one pass to the next by itself, while the host reads what the one before gave, and finds out who has ended.
Whoever has ended by then has had a pass for nothing: nobody reads its token, and what it wrote stands behind the
sequence's own.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fourfold.inference.cache import SlotCache
from fourfold.inference.drawing import Draw, Drawing, Drawn
from fourfold.inference.logprobs import TokenLogprob
from fourfold.inference.running import Running
from fourfold.inference.steps import Step
from fourfold.inference.transfers import to_device

__all__ = ["Passes"]

logger = logging.getLogger(__name__)


class _Pass(NamedTuple):
    """A pass that has begun: whom it gives a token, and the tokens that come."""

    group: list[Running]
    draw: Draw


class _Places(NamedTuple):
    """Slots and positions [n] of a group on the device, and what they are."""

    known: list[tuple[int, int]]
    slots: Tensor
    positions: Tensor


class Passes:
    """Decodes, and draws tokens.

    Args:
        step: What computes logits.
        cache: Its slots.
        drawing: What chooses tokens.
        runs_ahead: Whether a pass begins before the tokens of the one before have been read.
        take: Called with a sequence and its next token, -1 where none can be chosen.
        fail: Called with a sequence, and why it cannot go on.
    """

    def __init__(
        self,
        step: Step,
        cache: SlotCache,
        drawing: Drawing,
        runs_ahead: bool,
        take: Callable[[Running, int, TokenLogprob | None], None],
        fail: Callable[[Running, Exception], None],
    ) -> None:
        self._step, self._cache, self._drawing, self._device = step, cache, drawing, drawing.last.device
        self._runs_ahead, self._take, self._fail = runs_ahead, take, fail
        self._passes: list[_Pass] = []
        self._places: dict[str | None, _Places] = {}

    def forget(self) -> None:
        """Read nothing more of the passes that have begun."""
        self._passes.clear()
        self._places.clear()

    def first_token(self, running: Running, logits: Tensor) -> None:
        """Draw the token behind a prompt from its logits [vocab], and take it."""
        where = [running.slot.index, len(running.slot.tokens)]
        slot, position = to_device(where, torch.int64, self._device)[:, None]
        self._take_all([running], self._draw([running], slot, logits[None], position).read())

    def decode(self, decoding: list[Running]) -> None:
        """Begin a pass over each group that shares an adapter; then take what those before it gave."""
        before, self._passes = self._passes, []
        by_adapter: dict[str | None, list[Running]] = {}
        for running in decoding:
            by_adapter.setdefault(running.request.adapter, []).append(running)
        for adapter, group in by_adapter.items():
            # What a constraint allows only the tokens so far can tell.
            ahead = self._runs_ahead and all(running.request.constraint is None for running in group)
            if not ahead:
                self._land(before)
                group = [running for running in group if running.is_live]
            try:
                begun = [self._begin(group, adapter)] if group else []
            except Exception as error:
                self._land(before)
                self._alone([running for running in group if running.is_live], adapter, error)
                continue
            if ahead:
                self._passes += begun
            else:
                self._land(begun)
        self._land(before)

    def _alone(self, group: list[Running], adapter: str | None, error: Exception) -> None:
        """Whose fault it is that a pass failed shows when each goes alone. Writing a token again changes nothing."""
        if len(group) == 1:
            self._fail(group[0], error)
            return
        logger.warning("A pass over %d sequences failed; each goes alone: %s", len(group), error)
        for running in group:
            try:
                self._land([self._begin([running], adapter)])
            except Exception as own:
                self._fail(running, own)

    def _begin(self, group: list[Running], adapter: str | None) -> _Pass:
        """Begin a pass: write the last token of each, which may be on the device alone, and draw the next."""
        # Slots that lie side by side, in their order, are read where they are.
        group = sorted(group, key=lambda running: running.slot.index)
        known = [(running.slot.index, len(running.slot.tokens)) for running in group]
        self._cache.ensure(max(position for _, position in known) + 1)
        slots, positions = self._where(known, adapter)
        if all(running.todo for running in group):
            tokens = to_device([running.todo[0] for running in group], torch.int64, self._device)
        else:
            tokens = self._drawing.last[slots]
        logits = self._step.decode(tokens, slots, positions, self._cache, adapter)
        positions = positions + 1
        draw = self._draw(group, slots, logits, positions)
        # Only now: what failed before can be done again.
        self._places[adapter] = _Places([(slot, position + 1) for slot, position in known], slots, positions)
        for running in group:
            running.ahead += 1
            running.slot.tokens += running.todo
            running.todo.clear()
        return _Pass(group, draw)

    def _where(self, known: list[tuple[int, int]], adapter: str | None) -> tuple[Tensor, Tensor]:
        """Slots and positions int64 [n]; those that the pass before left, where they are the same."""
        held = self._places.get(adapter)
        if held is not None and held.known == known:
            return held.slots, held.positions
        slots, positions = to_device([list(column) for column in zip(*known, strict=True)], torch.int64, self._device)
        return slots, positions

    def _land(self, passes: list[_Pass]) -> None:
        """Take the tokens that passes gave, and leave none of them."""
        while passes:
            group, draw = passes.pop(0)
            for running in group:
                running.ahead -= 1
            if not any(running.is_live for running in group):
                continue
            try:
                drawn = draw.read()
            except Exception as error:
                for running in group:
                    self._fail(running, error)
            else:
                self._take_all(group, drawn)

    def _draw(self, group: list[Running], slots: Tensor, logits: Tensor, positions: Tensor) -> Draw:
        """Sample a token for each of these, which will stand at these positions."""
        allowed = self._allowed(group, logits.shape[1])
        return self._drawing.draw([running.sequence for running in group], slots, logits, positions, allowed)

    def _take_all(self, group: list[Running], drawn: list[Drawn]) -> None:
        for running, (token, logprob) in zip(group, drawn, strict=True):
            # It may have ended meanwhile, by its constraint.
            if not running.is_live:
                continue
            try:
                self._take(running, token, logprob)
            except Exception as error:
                self._fail(running, error)

    def _allowed(self, group: list[Running], vocab: int) -> Tensor | None:
        if all(running.request.constraint is None for running in group):
            return None
        allowed = torch.ones(len(group), vocab, dtype=torch.bool)
        for row, running in zip(allowed, group, strict=True):
            constraint = running.request.constraint
            if constraint is not None:
                try:
                    mask = constraint.mask(running.sequence.token_ids)
                    row[:] = False
                    row[: len(mask)] = mask[:vocab]
                except Exception as error:
                    self._fail(running, error)
        return allowed.to(self._device)
