"""Continuous batching: requests come and go while others run.

A step fills free slots from the queue, reads a share of the prompts that are not read yet, and gives each sequence that
runs one more token. A slot whose sequence has ended keeps its tokens: a prompt that begins with them, as the next turn
of a conversation does, is read from there on.

The engine belongs to one thread. What goes wrong in one sequence ends that one.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from typing import Any

import torch
from torch import Tensor

from fourfold.errors import InferenceError
from fourfold.inference.cache import SlotCache
from fourfold.inference.choosing import step_for
from fourfold.inference.drawing import Drawing
from fourfold.inference.footprint import ServingFootprint, fitting_options, free_bytes, serving_footprint
from fourfold.inference.generate import stop_token_ids
from fourfold.inference.logprobs import TokenLogprob
from fourfold.inference.options import EngineOptions
from fourfold.inference.passes import Passes
from fourfold.inference.requests import Chunk, FinishReason, Request, Sequence
from fourfold.inference.running import Running, Slot
from fourfold.inference.steps import Step
from fourfold.inference.text import Detokenizer, StopStrings
from fourfold.inference.transfers import to_device
from fourfold.models.underlying import underlying

__all__ = ["Engine"]

logger = logging.getLogger(__name__)


class Engine:
    """A model that continues many prompts at a time.

    Attributes:
        max_sequences, max_length: How many at a time, and tokens of each: as asked for, or what fits.
        footprint: What it takes of the device's memory with all of them at their full length.

    Args:
        model: A causal LM of Transformers, or a PEFT model around one; it is put into evaluation mode.
        tokenizer: Its tokenizer.
        options: How much at a time.
        step: What computes logits; without it the fastest that the model has.

    Raises:
        InferenceError: The model cannot be run so, or what is asked for does not fit.
    """

    def __init__(
        self, model: Any, tokenizer: Any, options: EngineOptions | None = None, *, step: Step | None = None
    ) -> None:
        self.options = options = options or EngineOptions()
        self.tokenizer = tokenizer
        base = underlying(model)
        self.device: torch.device = base.device
        model.eval()
        self.step_of_model: Step = step or step_for(model)
        context = getattr(base.config.get_text_config(decoder=True), "max_position_embeddings", None)
        shape = self.step_of_model.shape
        free = options.memory_bytes or free_bytes(self.device)
        captured = self.step_of_model.captured_bytes
        size = fitting_options(model, shape, options, context, free, captured)
        self.max_sequences, self.max_length = size
        self.footprint: ServingFootprint = serving_footprint(model, shape, options, *size, captured)
        self.cache = SlotCache(shape, self.max_sequences, self.max_length, self.device, options.first_bucket)
        self.stop_ids = frozenset(stop_token_ids(base, tokenizer))
        self._adapters: tuple[str, ...] = tuple(getattr(model, "peft_config", ()))
        self._free = [Slot(index) for index in range(self.max_sequences)]
        self._waiting: deque[Sequence] = deque()
        self._running: list[Running] = []
        self._chunks: list[Chunk] = []
        self._drawing = Drawing(self.max_sequences, self.step_of_model.vocab_size, self.device)
        runs_ahead = self.device.type == "cuda" if options.run_ahead is None else options.run_ahead
        self._passes = Passes(self.step_of_model, self.cache, self._drawing, runs_ahead, self._take, self._fail)
        self._num_steps = 0
        self._most_running = self.max_sequences

    @property
    def free_slots(self) -> int:
        """Slots that no sequence has."""
        return len(self._free)

    @property
    def waiting(self) -> int:
        """Sequences that have no slot yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences that have one."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether a step would do, or tell, anything."""
        return bool(self._waiting or self._running or self._chunks)

    def submit(self, request: Request) -> Sequence:
        """Queue a request.

        Raises:
            InferenceError: Its prompt leaves no room for an answer, has tokens the model does not know, or asks for an
                adapter that is not there.
        """
        length = len(request.prompt_ids)
        if length >= self.max_length:
            raise InferenceError(
                "the prompt is longer than the context",
                found=f"{length} tokens",
                allowed=f"up to {self.max_length - 1}, which leaves one for the answer",
            )
        vocab = self.step_of_model.vocab_size
        if not 0 <= min(request.prompt_ids) <= max(request.prompt_ids) < vocab:
            raise InferenceError("a token of the prompt that the model does not have", allowed=f"0 to {vocab - 1}")
        biased = max((token for token, _ in request.sampling.logit_bias), default=0)
        if biased >= vocab:
            raise InferenceError("logit_bias", found=biased, allowed=f"tokens of the model: 0 to {vocab - 1}")
        if request.adapter is not None and request.adapter not in self._adapters:
            raise InferenceError("unknown adapter", found=request.adapter, allowed=self._adapters or "none")
        sequence = Sequence(request)
        self._waiting.append(sequence)
        return sequence

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence; its slot is free at once, and the next step tells it. One that has ended stays as it is."""
        if sequence.finish_reason is not None:
            return
        if sequence in self._waiting:
            self._waiting.remove(sequence)
        self._finish(sequence, "cancelled")

    def forget(self) -> None:
        """Read no prompt from the middle of what slots hold now: after a fault nobody knows what that is."""
        self._passes.forget()
        for slot in (*self._free, *(running.slot for running in self._running)):
            slot.tokens.clear()

    def step(self) -> list[Chunk]:
        """Go on by a token: the pieces that sequences got."""
        self._num_steps += 1
        decoding = [running for running in self._running if running.goes_on]
        self._admit()
        self._prefill(keep_short=bool(decoding))
        self._passes.decode([running for running in decoding if running.is_live])
        chunks, self._chunks = self._chunks, []
        return chunks

    def _admit(self) -> None:
        if not self._running:
            self._most_running = self.max_sequences
        while self._waiting and len(self._running) < self._most_running:
            sequence = self._waiting.popleft()
            request = sequence.request
            prompt = list(request.prompt_ids)
            slot, reused = self._choose_slot(prompt, request.adapter)
            self._free.remove(slot)
            del slot.tokens[reused:]
            slot.adapter = request.adapter
            sequence.reused = reused
            most = min(request.max_new_tokens, self.max_length - len(prompt))
            running = Running(
                sequence, slot, prompt[reused:], Detokenizer(self.tokenizer), StopStrings(request.stop), most
            )
            self._running.append(running)
            self._drawing.begin(slot.index, request)

    def _choose_slot(self, prompt: list[int], adapter: str | None) -> tuple[Slot, int]:
        """The free slot that holds most of the prompt's beginning, or else was not used for longest."""
        best, most = min(self._free, key=lambda slot: slot.used_at), 0
        if self.options.reuse_prefixes:
            for slot in self._free:
                if slot.adapter == adapter:
                    common = _common(slot.tokens, prompt)
                    if common > most:
                        best, most = slot, common
        # The last token is read again, for its logits.
        return best, min(most, len(prompt) - 1)

    def _prefill(self, keep_short: bool) -> None:
        most = self.options.prefill_chunk if keep_short else max(self.options.prefill_chunk, self.options.prefill_alone)
        left = most
        for running in list(self._running):
            sequence = running.sequence
            while sequence.finish_reason is None and not sequence.token_ids:
                part = running.todo[:left]
                try:
                    logits = self._read(running, part)
                    if not running.todo:
                        self._passes.first_token(running, logits)
                except torch.OutOfMemoryError as error:
                    if len(self._running) == 1:
                        self._fail(running, error)
                    else:
                        self._wait_again(running)
                    break
                except Exception as error:
                    self._fail(running, error)
                left -= len(part)
                if left <= 0:
                    # Nor do first tokens wait for the prompts behind them.
                    if keep_short or self._chunks:
                        return
                    left = most

    def _wait_again(self, running: Running) -> None:
        """There is no memory for this prompt beside those that run: it comes next when one of them has ended."""
        logger.warning("No memory for a prompt of %d tokens now: it waits", len(running.request.prompt_ids))
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self._release(running)
        self._waiting.appendleft(running.sequence)
        self._most_running = len(self._running)

    def _read(self, running: Running, part: list[int]) -> Tensor:
        slot = running.slot
        start = len(slot.tokens)
        self.cache.ensure(start + len(part))
        input_ids = to_device(part, torch.int64, self.device)
        logits = self.step_of_model.prefill(slot.index, input_ids, self.cache, running.request.adapter, start)
        slot.tokens += part
        del running.todo[: len(part)]
        return logits

    def _take(self, running: Running, token: int, logprob: TokenLogprob | None) -> None:
        sequence, request = running.sequence, running.request
        if token < 0:
            raise InferenceError("no token can be chosen: logits are not finite, or the constraint allows none")
        if sequence.first_token_at is None:
            sequence.first_token_at = time.monotonic()
        sequence.token_ids.append(token)
        logprobs = () if logprob is None else (logprob,)
        if token in self.stop_ids and not request.ignore_eos:
            self._finish(sequence, "stop", self._rest(running), (token,), logprobs)
            return
        if request.constraint is not None:
            request.constraint.advance(token)
        text, is_stopped = running.stop.add(running.detokenizer.add(token))
        if is_stopped:
            self._finish(sequence, "stop", text, (token,), logprobs)
        elif len(sequence.token_ids) >= running.most_tokens:
            self._finish(sequence, "length", text + self._rest(running), (token,), logprobs)
        else:
            # A pass that has begun since then has written it.
            (running.slot.tokens if running.ahead else running.todo).append(token)
            sequence.text += text
            self._chunks.append(Chunk(sequence, text, (token,), logprobs))

    def _rest(self, running: Running) -> str:
        """Text that was held back, if no stop string is in it."""
        text, is_stopped = running.stop.add(running.detokenizer.end())
        return text if is_stopped else text + running.stop.end()

    def _fail(self, running: Running, error: Exception) -> None:
        sequence = running.sequence
        if sequence.finish_reason is not None:
            return
        logger.warning("Sequence %d ends with an error: %s", sequence.number, error)
        logger.debug("where it comes from", exc_info=error)
        sequence.error = str(error) or type(error).__name__
        # What the slot holds now is not certain.
        running.slot.tokens.clear()
        self._finish(sequence, "error")

    def _finish(
        self,
        sequence: Sequence,
        reason: FinishReason,
        text: str = "",
        token_ids: tuple[int, ...] = (),
        logprobs: tuple[TokenLogprob, ...] = (),
    ) -> None:
        sequence.text += text
        sequence.finish_reason = reason
        sequence.finished_at = time.monotonic()
        for running in [running for running in self._running if running.sequence is sequence]:
            self._release(running)
        self._chunks.append(Chunk(sequence, text, token_ids, logprobs, reason))

    def _release(self, running: Running) -> None:
        running.slot.used_at = self._num_steps
        self._free.append(running.slot)
        self._free.sort(key=lambda slot: slot.index)
        self._running.remove(running)


def _common(one: list[int], other: list[int]) -> int:
    """Tokens that both begin with."""
    for index, (mine, theirs) in enumerate(zip(one, other, strict=False)):
        if mine != theirs:
            return index
    return min(len(one), len(other))
