"""Answers of the model while it trains, so that a person sees what the loss does not say."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from fourfold.inference import GenerationOptions, Message, generate_replies
from fourfold.training.run_folder import SAMPLES_FILE, append_metrics, read_metrics, write_metrics

__all__ = ["Answer", "Prompt", "SampleCallback"]


@dataclass(frozen=True)
class Prompt:
    """What the model is asked.

    Attributes:
        shown: As it was given, and as it stands in samples.jsonl: a text or the turns of a conversation.
        asked: What is generated from: turns; or a text, which is continued as it is.
        reference: The answer that is wanted, where one is known.
    """

    shown: str | list[Message]
    asked: str | list[Message]
    reference: str | None = None


@dataclass(frozen=True)
class Answer:
    """One line of samples.jsonl."""

    step: int
    prompt: str | list[Message]
    answer: str
    reference: str | None

    def last_turn(self) -> str:
        """The prompt's text, of a conversation the last turn's."""
        return self.prompt if isinstance(self.prompt, str) else self.prompt[-1]["content"]


class SampleCallback(TrainerCallback):
    """Has the model answer prompts, writes the answers into the run folder and tells them.

    Greedy, in evaluation mode, with the random generators put back: the steps that follow are those of a run without
    it, bit for bit on the CPU. To be added after the trainer's own callbacks, whose clock stops at the end of a step.

    Args:
        prompts: At least one.
        tokenizer: The model's.
        options: How to generate.
        run_folder: Where samples.jsonl is.
        every: Optimizer steps; None: with each evaluation.
        tell: Each is given the trainer's state and the answers.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        tokenizer: PreTrainedTokenizerBase,
        options: GenerationOptions,
        run_folder: Path,
        every: int | None = None,
        tell: Sequence[Callable[[TrainerState, list[Answer]], None]] = (),
    ) -> None:
        self.prompts = list(prompts)
        self.tokenizer = tokenizer
        self.options = options
        self.path = run_folder / SAMPLES_FILE
        self.every = every
        self.tell = tell
        self._answered: int | None = None
        self._is_training = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._answered = None
        self._is_training = True
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            former = read_metrics(self.path) if state.global_step and self.path.exists() else []
            write_metrics(self.path, [answer for answer in former if answer["step"] <= state.global_step])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        if self.every is not None and state.global_step % self.every == 0:
            self._answer(state, model)

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        # Of several evaluation sets each is told by itself. After training, trackers are closed.
        if self.every is None and self._answered != state.global_step and self._is_training:
            self._answer(state, model)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._is_training = False

    def _answer(self, state: TrainerState, model: Any) -> None:
        self._answered = state.global_step
        # All processes do: of a sharded model none computes alone.
        replies = generate_replies(model, self.tokenizer, [one.asked for one in self.prompts], self.options)
        if not state.is_world_process_zero:
            return
        answers = [
            Answer(state.global_step, prompt.shown, reply, prompt.reference)
            for prompt, reply in zip(self.prompts, replies, strict=True)
        ]
        for answer in answers:
            append_metrics(self.path, asdict(answer))
        for tell in self.tell:
            tell(state, answers)
