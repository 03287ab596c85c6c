"""The keys that choose a training method, and what does not fit it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import BaseModel, Field

if TYPE_CHECKING:
    from fourfold.config.run import RunConfig

__all__ = ["PREFERENCE_METHODS", "Contradiction", "MethodKeys", "method_contradictions", "training_contradictions"]

Method = Literal["sft", "dpo", "kto", "orpo", "reward", "pretrain"]
DpoLoss = Literal[
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "sft",
    "sigmoid_norm",
]
KtoLoss = Literal["kto", "apo_zero_unpaired"]
Above0 = Annotated[float, Field(gt=0)]


class MethodKeys(BaseModel):
    """The part of RunConfig that says what is learned from the rows. Null: TRL's default for the method."""

    method: Method = Field(
        "sft",
        description="What is learned: answers (sft), raw text (pretrain), preferences between two answers (dpo, orpo), "
        "answers marked good or bad (kto), or a score for answers (reward).",
    )
    beta: Above0 | None = Field(
        None, description="How near the model stays to its reference (dpo, kto), or the weight of the odds (orpo); 0.1."
    )
    loss_type: DpoLoss | KtoLoss | list[DpoLoss] | None = Field(
        None, description="Loss of dpo (sigmoid), one or a list of them that are summed up; or of kto (kto)."
    )
    loss_weights: list[float] | None = Field(None, description="Weight of each loss in the list of dpo; 1.")
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] | None = Field(
        None, description="Share of pairs that are the wrong way round, for dpo's robust, exo_pair and aot losses; 0."
    )
    precompute_ref_log_probs: bool | None = Field(
        None, description="For dpo: ask the reference once, before training, instead of in each step."
    )
    desirable_weight: Above0 | None = Field(None, description="Weight of kto's good answers; 1.")
    undesirable_weight: Above0 | None = Field(None, description="Weight of kto's bad answers; 1.")
    center_rewards_coefficient: Above0 | None = Field(
        None, description="For reward: weight of the squared sum of a pair's scores, so that they stay near 0."
    )


class Contradiction(NamedTuple):
    """Keys that are each valid and do not fit together."""

    keys: tuple[str, ...]
    what: str
    hint: str


PREFERENCE_METHODS = ("dpo", "kto", "orpo", "reward")

# key -> the methods that it means something to
_METHODS_OF: dict[str, tuple[str, ...]] = {
    "beta": ("dpo", "kto", "orpo"),
    "loss_type": ("dpo", "kto"),
    "loss_weights": ("dpo",),
    "label_smoothing": ("dpo",),
    "precompute_ref_log_probs": ("dpo",),
    "desirable_weight": ("kto",),
    "undesirable_weight": ("kto",),
    "center_rewards_coefficient": ("reward",),
    "packing": ("sft", "pretrain"),
    "group_by_length": ("sft", "pretrain"),
    "train_on_prompt": ("sft",),
    "eval_generate_rows": ("sft",),
}
# row format -> the methods that learn from its rows
_METHODS_OF_ROWS: dict[str, tuple[str, ...]] = {
    "messages": ("sft",),
    "sharegpt": ("sft",),
    "alpaca": ("sft",),
    "prompt_completion": ("sft",),
    "text": ("sft", "pretrain"),
    "preference": ("dpo", "orpo", "reward"),
    "kto": ("kto",),
}
_WITHOUT_REFERENCE = {"dpo": "give precompute_ref_log_probs: true", "kto": "give method: dpo or orpo"}
_SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}


def method_contradictions(config: RunConfig) -> Iterator[Contradiction]:
    """What of `config` does not fit its method."""
    method = config.method
    for key, methods in _METHODS_OF.items():
        if getattr(config, key) and method not in methods:
            yield Contradiction(
                (key, "method"),
                f"{key} means nothing to method: {method}",
                f"leave {key} out, or give method: {' or '.join(methods)}",
            )
    yield from _row_contradictions(config)
    if config.requantize_every is not None and method in ("dpo", "kto") and not config.precompute_ref_log_probs:
        yield Contradiction(
            ("requantize_every", "method"),
            f"requantize_every changes the base, which method: {method} refers to",
            f"leave requantize_every out, or {_WITHOUT_REFERENCE[method]}",
        )
    if method in ("dpo", "kto"):
        yield from _loss_contradictions(config)
    if method not in PREFERENCE_METHODS:
        return
    if config.lora_dropout > 0:
        yield Contradiction(
            ("lora_dropout", "method"),
            f"lora_dropout makes two answers differ by chance, and method: {method} compares them",
            "leave lora_dropout out (TRL switches it off as well)",
        )
    if method == "kto" and config.loss_type != "apo_zero_unpaired" and config.per_device_train_batch_size < 2:
        yield Contradiction(
            ("per_device_train_batch_size", "method"),
            "per_device_train_batch_size is 1, and kto pairs the rows of a microbatch with one another",
            "give 2 or more, or loss_type: apo_zero_unpaired",
        )


def _row_contradictions(config: RunConfig) -> Iterator[Contradiction]:
    listed = config.train_dataset if isinstance(config.train_dataset, list) else []
    for row_format in dict.fromkeys([config.row_format, *(entry.row_format for entry in listed)]):
        if row_format in _METHODS_OF_ROWS and config.method not in _METHODS_OF_ROWS[row_format]:
            yield Contradiction(
                ("row_format", "method"),
                f"rows of row_format {row_format} are not what method: {config.method} learns from",
                f"give other rows, or method: {' or '.join(_METHODS_OF_ROWS[row_format])}",
            )
    if config.row_format == "text" and config.eval_generate_rows:
        yield Contradiction(
            ("eval_generate_rows", "row_format"),
            "eval_generate_rows asks for answers, and rows of row_format text have none",
            "leave eval_generate_rows out",
        )


def _loss_contradictions(config: RunConfig) -> Iterator[Contradiction]:
    kinds = config.loss_type if isinstance(config.loss_type, list) else [config.loss_type or ""]
    is_kto = config.method == "kto"
    for kind in kinds:
        if kind and (kind in ("kto", "apo_zero_unpaired")) != is_kto:
            allowed = "kto or apo_zero_unpaired" if is_kto else "sigmoid, ipo or another of dpo's"
            yield Contradiction(
                ("loss_type", "method"),
                f"loss_type {kind} is no loss of method: {config.method}",
                f"give {allowed}, or leave loss_type out",
            )
    if config.loss_weights is not None and len(config.loss_weights) != len(kinds):
        yield Contradiction(
            ("loss_weights", "loss_type"),
            f"loss_weights has {len(config.loss_weights)} numbers, and loss_type {len(kinds)} losses",
            "give one weight for each loss",
        )
    if config.label_smoothing and not _SMOOTHED & set(kinds):
        yield Contradiction(
            ("label_smoothing", "loss_type"),
            "label_smoothing is given, and none of loss_type's losses is smoothed",
            "give loss_type: robust, or leave label_smoothing out",
        )
    if "exo_pair" in kinds and not config.label_smoothing:
        yield Contradiction(
            ("label_smoothing", "loss_type"),
            "loss_type exo_pair takes a logarithm of label_smoothing, which is 0",
            "give label_smoothing: 0.001",
        )


def training_contradictions(config: RunConfig) -> Iterator[Contradiction]:
    """What cannot be trained though it can be measured: such a configuration is refused by `train` alone."""
    keeps_start = isinstance(config.init_lora_weights, bool) or config.init_lora_weights == "gaussian"
    if config.adapter is None:
        for key, is_set, hint in (
            ("load_in_4bit", config.load_in_4bit, "give load_in_4bit: false (--no-load_in_4bit)"),
            ("load_in_8bit", config.load_in_8bit, "give load_in_8bit: false and load_in_4bit: false"),
            ("recompute", config.recompute is not None, "give gradient_checkpointing instead"),
            ("fused_blocks", bool(config.fused_blocks), "leave it out"),
            ("cuda_graphs", bool(config.cuda_graphs), "leave it out"),
        ):
            if is_set:
                yield Contradiction(
                    ("adapter", key),
                    f"{key}: {getattr(config, key)} and adapter: null, which trains all weights, in 16 bits or 32",
                    f"{hint}, or give adapter: lora",
                )
    if config.method not in ("dpo", "kto") or config.precompute_ref_log_probs:
        return
    remedy = _WITHOUT_REFERENCE[config.method]
    if config.adapter is None:
        yield Contradiction(
            ("adapter", "method"),
            f"method: {config.method} refers to the base, and adapter: null leaves none once all weights are trained",
            f"{remedy}, or adapter: lora",
        )
    elif not keeps_start:
        yield Contradiction(
            ("init_lora_weights", "method"),
            f"init_lora_weights: {config.init_lora_weights} starts elsewhere than the base without its adapter, "
            f"which method: {config.method} refers to",
            f"{remedy}, or leave init_lora_weights out",
        )
