"""What a run's model is asked while it trains, by its configuration; and the callback that asks it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from fourfold.config import RunConfig
from fourfold.data import PreparedData
from fourfold.errors import DataError
from fourfold.inference import GenerationOptions
from fourfold.training.progress import ProgressCallback
from fourfold.training.samples import Prompt, SampleCallback
from fourfold.training.trackers import send_samples
from fourfold.training.trainer import FourfoldTrainer

__all__ = ["add_samples", "prompts_of"]


def prompts_of(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, eval_data: Mapping[str, PreparedData]
) -> list[Prompt]:
    """`sample_prompts`, then `sample_rows` of each set of held-out rows.

    Raises:
        DataError: A file of prompts that is not there or not of a known form, naming the line; turns that are none; or
            a tokenizer without a chat template for them.
    """
    given = config.sample_prompts
    named = _read_prompts(Path(given)) if isinstance(given, str) else enumerate(given or [], start=1)
    source = given if isinstance(given, str) else "sample_prompts"
    continues = config.method == "pretrain"
    prompts = [_prompt(value, f"{source}, prompt {number}", continues) for number, value in named]
    for data in eval_data.values() if config.sample_rows else ():
        rows = data.dataset.select(range(min(config.sample_rows, len(data.dataset))))
        prompts += [_prompt(list(turns), data.report.name, continues) for turns in rows["messages"]]
    if not tokenizer.chat_template and any(not isinstance(prompt.asked, str) for prompt in prompts):
        raise DataError("the tokenizer has no chat template, by which prompts are asked", hint="set chat_template")
    return prompts


def _read_prompts(path: Path) -> Iterator[tuple[int, Any]]:
    """Number and content of each line that is not empty."""
    if path.suffix not in (".txt", ".jsonl") or not path.is_file():
        raise DataError(
            f"sample_prompts names no file of prompts: {path}",
            found="no such file" if not path.is_file() else path.suffix,
            allowed=".txt or .jsonl; or a list of texts",
        )
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield number, line.strip() if path.suffix == ".txt" else json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON", found=line[:80]) from error


def _prompt(value: Any, where: str, continues: bool) -> Prompt:
    """A prompt of a text, of turns, or of an object that holds one of them."""
    if isinstance(value, dict):
        value = value.get("messages", value.get("prompt"))
    if isinstance(value, str) and value:
        return Prompt(value, value if continues else [{"role": "user", "content": value}])
    is_turns = (
        isinstance(value, list)
        and value
        and all(
            isinstance(turn, dict) and isinstance(turn.get("role"), str) and isinstance(turn.get("content"), str)
            for turn in value
        )
    )
    if not is_turns:
        raise DataError(f"{where}: neither a text nor turns", found=value, allowed="turns of role and content")
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in value]
    reference = turns.pop()["content"] if turns[-1]["role"] == "assistant" else None
    if not turns:
        raise DataError(f"{where}: an answer without a prompt", found=value)
    return Prompt(turns, turns, reference)


def add_samples(
    config: RunConfig,
    trainer: FourfoldTrainer,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[Prompt],
    progress: ProgressCallback,
) -> None:
    """Have the trainer's model answer the prompts as it trains, if there are any."""
    if not prompts:
        return
    options = GenerationOptions(
        max_new_tokens=config.sample_max_new_tokens, batch_size=config.eval_generate_batch_size, seed=config.seed
    )
    tell = [progress.tell_samples, send_samples(trainer.callback_handler.callbacks)]
    trainer.add_callback(
        SampleCallback(prompts, tokenizer, options, Path(config.output_dir), config.sample_steps, tell)
    )
