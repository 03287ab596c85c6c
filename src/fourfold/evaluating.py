"""Models side by side: each measured on the same rows and prompts, with what that took."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from fourfold.config import RunConfig
from fourfold.config import options as choices
from fourfold.config.methods import PREFERENCE_METHODS
from fourfold.data import PreparedData
from fourfold.errors import DataError
from fourfold.evaluation.figures import IntervalOptions
from fourfold.evaluation.side_by_side import Comparison, Cost, MeasuredModel, compare_measured
from fourfold.evaluation.tasks import TASKS, Measured, asked, run_tasks
from fourfold.inputs import read_held_out, read_tokenizer
from fourfold.limiting import within_limit
from fourfold.measuring import held_out_rows, require_measures
from fourfold.memory.energy import EnergyMeter
from fourfold.memory.meter import memory_used, reset_peak
from fourfold.models.loading import load_tokenizer
from fourfold.models.size import model_size
from fourfold.telling import Speaker
from fourfold.variants import Variant, find_variants

__all__ = ["compare"]


@within_limit
def compare(
    config: RunConfig, names: Sequence[str], progress: str = "plain", intervals: IntervalOptions | None = None
) -> Comparison:
    """Measure models side by side by what a configuration asks for.

    Rows are read, and turned into tokens, once: with the tokenizer of the first model, and with the configuration's
    chat template and pad token. A model with another tokenizer is asked the same conversations by its own, and what is
    counted by token is left out for it.

    Args:
        config: What is measured; and the run that names such as `adapter` belong to.
        names: See `fourfold.variants.find_variants`; the others are compared with the first.
        progress: A key of `PROGRESS`.
        intervals: How intervals are made.

    Raises:
        ConfigError: Nothing to measure on, or names that name nothing.
        CheckpointError: A model that is not there or not whole.
        AdapterError: An adapter that belongs to another base.
        DataError: Rows that cannot be measured on; or tokenizers differ, and nothing is asked for that could be
            compared nevertheless.
    """
    say = Speaker(progress)
    require_measures(config)
    variants = find_variants(names, config)
    tokenizer = read_tokenizer(config, _source(config, variants[0]))
    eval_data = read_held_out(config, tokenizer)
    for data in eval_data.values():
        say.result("data", data.report)
    options = choices.evaluation_options(config)
    without = {"loss"} if config.method in PREFERENCE_METHODS else set()
    wanted = asked(options, len(eval_data), without)
    own_tokenizers = {variant.name: _tokenizer_of(config, variant, tokenizer, eval_data) for variant in variants}
    _require_comparable(wanted, [name for name, own in own_tokenizers.items() if own is not tokenizer])
    models = []
    for variant in variants:
        say.line(f"{variant.name}: {variant.what}")
        own = own_tokenizers[variant.name]
        left_out = {} if own is tokenizer else _left_out(wanted, variants[0].name)
        for task, reason in left_out.items():
            say.line(f"  without {task}: {reason}")
        models.append(_measure(config, variant, own, eval_data, say, without, left_out))
    return compare_measured(models, intervals or IntervalOptions(seed=config.seed))


def _source(config: RunConfig, variant: Variant) -> str | None:
    """Where a model's tokenizer is; None: where the configuration's model is, in its revision."""
    return None if variant.tokenizer == config.model_name_or_path else variant.tokenizer


def _tokenizer_of(
    config: RunConfig,
    variant: Variant,
    reference: PreTrainedTokenizerBase,
    eval_data: Mapping[str, PreparedData],
) -> PreTrainedTokenizerBase:
    """The reference where the model's own makes the same tokens of texts, so that the prompts are the same; else its
    own."""
    source = _source(config, variant)
    own = load_tokenizer(variant.tokenizer, revision=config.model_revision if source is None else None)
    if own.get_vocab() == reference.get_vocab():
        texts = _some_texts(eval_data)
        if own(texts)["input_ids"] == reference(texts)["input_ids"]:
            return reference
    return read_tokenizer(config.model_copy(update={"pad_token": None, "chat_template": None}), source)


def _some_texts(eval_data: Mapping[str, PreparedData]) -> list[str]:
    texts = ["Paid Nordwind 1,249.50 euros on 7 March 2024.\n\n  Yes:\t3 items.", "naïve café, Привет, 支付了"]
    for data in eval_data.values():
        if "messages" in data.dataset.column_names:
            rows = data.dataset.select(range(min(8, len(data.dataset))))
            texts += [turn["content"] for row in rows["messages"] for turn in row]
    return texts


def _require_comparable(wanted: Iterable[str], with_another: Sequence[str]) -> None:
    if with_another and all(TASKS[task].is_by_token for task in wanted):
        raise DataError(
            "loss and perplexity are of tokens, and do not compare between tokenizers",
            found=f"another tokenizer: {', '.join(with_another)}",
            hint="compare answers: set eval_generate_rows, multiple_choice_dataset or harness_tasks",
        )


def _left_out(wanted: Iterable[str], first: str) -> dict[str, str]:
    return {task: f"its tokenizer is not {first}'s" for task in wanted if TASKS[task].is_by_token}


def _measure(
    config: RunConfig,
    variant: Variant,
    tokenizer: PreTrainedTokenizerBase,
    eval_data: Mapping[str, PreparedData],
    say: Speaker,
    without: Iterable[str],
    left_out: Mapping[str, str],
) -> MeasuredModel:
    device = choices.device(config)
    model: Any = variant.load()
    weights_bytes = model_size(model).num_bytes
    reset_peak(device)
    meter = EnergyMeter(device)
    options = choices.evaluation_options(config)
    held_out = held_out_rows(tokenizer, eval_data)
    measured = run_tasks(model, tokenizer, options, held_out, say.line, {*without, *left_out})
    cost = Cost(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        weights_bytes=weights_bytes,
        peak_bytes=memory_used(device).peak_bytes,
        scored_per_second=_speed(measured, generates=False),
        generated_per_second=_speed(measured, generates=True),
        joules=meter.joules(),
    )
    # The next one is to find the memory free.
    del model
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return MeasuredModel(variant.name, variant.what, measured, cost, left_out)


def _speed(measured: Mapping[str, Measured], *, generates: bool) -> float | None:
    """Tokens a second of tasks that write answers, or of those that score texts."""
    chosen = [one for task, one in measured.items() if TASKS[task].generates == generates and one.num_tokens]
    seconds = sum(one.seconds for one in chosen)
    return sum(one.num_tokens for one in chosen) / seconds if seconds else None
