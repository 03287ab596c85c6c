"""The keys of what happens while a run trains: best checkpoint, early stopping, samples, noise, rates, trackers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

from pydantic import BaseModel, ConfigDict, Field

from fourfold.config.methods import PREFERENCE_METHODS, Contradiction
from fourfold.config.types import Count, CountOrZero

if TYPE_CHECKING:
    from fourfold.config.run import RunConfig

__all__ = ["LifeKeys", "LrGroup", "life_contradictions"]

Above0 = Annotated[float, Field(gt=0)]
Text = Annotated[str, Field(min_length=1)]
Turns = Annotated[list[dict[str, str]], Field(min_length=1)]
Prompts = Annotated[
    list[Text | Turns],
    Field(min_length=1, description="a list of texts, or of conversations (lists of mappings with role and content)"),
]


class LrGroup(BaseModel):
    """Parameters with a learning rate of their own."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    name: str | None = Field(None, min_length=1)
    modules: list[Text] = Field(min_length=1)
    lr: Above0


LrGroups = Annotated[
    list[LrGroup],
    Field(
        min_length=1,
        description="a list of mappings with modules (parts of parameters' names, or globs), lr and, if wanted, name",
    ),
]


class LifeKeys(BaseModel):
    """The part of RunConfig that says what is done beside the steps themselves."""

    load_best_model_at_end: bool = Field(
        False,
        description="Keep the best evaluated checkpoint, and leave its weights as the run's result instead of the "
        "last ones.",
    )
    metric_for_best_model: str | None = Field(
        None,
        min_length=1,
        description="Figure of the evaluations that says which is the best, with or without eval_; null: eval_loss. "
        "With several evaluation sets, eval_NAME_loss or another of one set.",
    )
    greater_is_better: bool | None = Field(
        None, description="Whether the best is the highest; null: unless the figure's name ends with loss."
    )
    early_stopping_patience: Count | None = Field(
        None, description="Evaluations without a better figure after which training stops; null: it never does."
    )
    early_stopping_threshold: float = Field(
        0.0, ge=0, description="By how much a figure must be better than the best one to count as better."
    )
    adapter_weight: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0,
        description="What the adapter is multiplied by when training ends, before it is saved and measured: less of "
        "the task, more of what the base could. Checkpoints have it as it trained.",
    )
    sample_prompts: Text | Prompts | None = Field(
        None,
        description="What the model answers now and then while it trains: texts or conversations, or a file of them "
        "(.txt: a text a line; .jsonl: a text, a list of turns, or an object with messages or prompt a line).",
    )
    sample_rows: CountOrZero = Field(0, description="Held-out rows that it answers as well, the first of each set.")
    sample_steps: Count | None = Field(
        None, description="Optimizer steps between two rounds of answers; null: with each evaluation."
    )
    sample_max_new_tokens: Count = Field(128, description="Longest answer of these, in tokens.")
    neftune_noise_alpha: Above0 | None = Field(
        None, description="Strength of NEFTune's noise on the embeddings, in training alone; null: none."
    )
    loraplus_lr_ratio: Above0 | None = Field(
        None, description="LoRA+: learning rate of the adapters' B as a multiple of that of A; null: the same."
    )
    loraplus_lr_embedding: Above0 | None = Field(
        None, description="LoRA+: learning rate of adapters on embeddings; null: 1e-6."
    )
    lr_groups: LrGroups | None = Field(
        None, description="Learning rates of their own for some parameters; the first group that names one has it."
    )
    run_name: str | None = Field(
        None, min_length=1, description="The run's name in trackers; null: that of its output_dir."
    )
    project: str | None = Field(
        None,
        min_length=1,
        description="Its project in W&B and trackio, its experiment in MLflow; null: as their environment variables "
        "have it, such as WANDB_PROJECT.",
    )


def life_contradictions(config: RunConfig) -> Iterator[Contradiction]:
    """What of these keys does not fit together, or to others."""
    yield from _best_contradictions(config)
    yield from _weight_contradictions(config)
    yield from _sample_contradictions(config)
    if config.neftune_noise_alpha is not None and config.method in PREFERENCE_METHODS:
        yield Contradiction(
            ("neftune_noise_alpha", "method"),
            f"neftune_noise_alpha makes two answers differ by chance, and method: {config.method} compares them",
            "leave neftune_noise_alpha out",
        )
    if config.loraplus_lr_ratio is not None and config.adapter is None:
        yield Contradiction(
            ("loraplus_lr_ratio", "adapter"),
            "loraplus_lr_ratio is given, and adapter is null",
            "set adapter: lora, or give lr_groups",
        )
    if config.loraplus_lr_embedding is not None and config.loraplus_lr_ratio is None:
        yield Contradiction(
            ("loraplus_lr_embedding", "loraplus_lr_ratio"),
            "loraplus_lr_embedding is given without loraplus_lr_ratio",
            "give loraplus_lr_ratio as well, or lr_groups",
        )


def _best_contradictions(config: RunConfig) -> Iterator[Contradiction]:
    has_held_out = config.eval_dataset is not None or config.eval_split_fraction > 0
    asks = [key for key in ("load_best_model_at_end", "early_stopping_patience") if getattr(config, key)]
    for key in asks:
        if not has_held_out:
            yield Contradiction(
                (key, "eval_dataset", "eval_split_fraction"),
                f"{key} is given, but no rows are held out",
                "give eval_dataset or eval_split_fraction",
            )
    for key in ("metric_for_best_model", "greater_is_better"):
        if getattr(config, key) is not None and not asks:
            yield Contradiction(
                (key, "load_best_model_at_end", "early_stopping_patience"),
                f"{key} is given, and nothing asks which evaluation is the best",
                "give load_best_model_at_end: true or early_stopping_patience",
            )
    if config.early_stopping_threshold and config.early_stopping_patience is None:
        yield Contradiction(
            ("early_stopping_threshold", "early_stopping_patience"),
            "early_stopping_threshold is given without early_stopping_patience",
            "give early_stopping_patience",
        )
    if asks and isinstance(config.eval_dataset, dict):
        named = (config.metric_for_best_model or "").removeprefix("eval_")
        if not any(named.startswith(f"{name}_") for name in config.eval_dataset):
            names = ", ".join(f"eval_{name}_loss" for name in config.eval_dataset)
            yield Contradiction(
                ("metric_for_best_model", "eval_dataset"),
                "there are several evaluation sets, and metric_for_best_model names a figure of none of them",
                f"give one, such as {names}",
            )
    if config.load_best_model_at_end and config.requantize_every is not None:
        yield Contradiction(
            ("load_best_model_at_end", "requantize_every"),
            "the best adapter would belong to another base than the last one, which requantize_every leaves",
            "give one of them",
        )


def _weight_contradictions(config: RunConfig) -> Iterator[Contradiction]:
    """Where w s B A is not w times what was trained, or the base without it is not what training began from."""
    if config.adapter_weight == 1:
        return
    start = config.init_lora_weights
    for key, is_set, what in (
        ("adapter", config.adapter is None, "adapter: null trains all weights, and there is none"),
        ("use_dora", config.use_dora, "use_dora scales the weight by a norm that is not multiplied along"),
        (
            "init_lora_weights",
            isinstance(start, str) and start != "gaussian",
            f"init_lora_weights: {start} gives it a part of the base, which would be multiplied too",
        ),
        ("modules_to_save", bool(config.modules_to_save), "modules_to_save are trained beside it, and would stay"),
        ("method", config.method == "reward", "method: reward trains a layer of scores beside it, which would stay"),
        (
            "requantize_every",
            config.requantize_every is not None,
            "requantize_every leaves but the last part of what was learned in it",
        ),
    ):
        if is_set:
            yield Contradiction(
                ("adapter_weight", key),
                f"adapter_weight: {config.adapter_weight:g} multiplies the adapter, and {what}",
                f"give adapter_weight: 1, or leave {key} out",
            )


def _sample_contradictions(config: RunConfig) -> Iterator[Contradiction]:
    has_held_out = config.eval_dataset is not None or config.eval_split_fraction > 0
    asks = [key for key in ("sample_prompts", "sample_rows") if getattr(config, key)]
    if config.sample_steps is not None and not asks:
        yield Contradiction(
            ("sample_steps", "sample_prompts", "sample_rows"),
            "sample_steps is given, and there is nothing to answer",
            "give sample_prompts or sample_rows",
        )
    if config.sample_rows and not has_held_out:
        yield Contradiction(
            ("sample_rows", "eval_dataset", "eval_split_fraction"),
            "sample_rows is given, but no rows are held out",
            "give eval_dataset or eval_split_fraction",
        )
    elif asks and config.sample_steps is None and not has_held_out:
        yield Contradiction(
            ("sample_prompts", "sample_steps"),
            "sample_prompts are answered with each evaluation, and no rows are held out",
            "give sample_steps",
        )
    if asks and config.method == "reward":
        yield Contradiction(
            (asks[0], "method"),
            f"{asks[0]} asks for answers, and method: reward trains a model that gives scores",
            f"leave {asks[0]} out",
        )
