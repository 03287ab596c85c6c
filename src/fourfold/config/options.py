"""From the run's configuration to the narrow options that each room defines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig

from fourfold.config.distributed import distributed_contradictions
from fourfold.config.run import RunConfig
from fourfold.data import DataOptions
from fourfold.data.mixture import check_weights
from fourfold.data.preference import PREFERENCE_ROWS
from fourfold.data.sources import DataSource
from fourfold.errors import ConfigError
from fourfold.evaluation.harness import HarnessOptions
from fourfold.evaluation.tasks import EvaluationOptions
from fourfold.inference import GenerationOptions
from fourfold.memory.gpus import parse_bytes
from fourfold.models.loading import default_device, default_dtype
from fourfold.quantization.hf_config import FourfoldConfig
from fourfold.training.best import BestOptions
from fourfold.training.deepspeed_config import stage_of_file
from fourfold.training.distributed import distributed_row, processes
from fourfold.training.evaluation_sets import prefix_of
from fourfold.training.methods import FIGURES, MethodOptions
from fourfold.training.options import TrainingOptions
from fourfold.training.parameter_groups import GroupOptions, LrGroup

__all__ = [
    "best_options",
    "compute_dtype",
    "data_options",
    "data_sources",
    "device",
    "eval_datasets",
    "evaluation_options",
    "generation_options",
    "group_options",
    "load_options",
    "lora_config",
    "memory_limit",
    "merged_dtype",
    "method_options",
    "quantization",
    "stream_options",
    "training_options",
    "with_deepspeed",
]


def with_deepspeed(config: RunConfig) -> RunConfig:
    """The configuration, with `distributed` as its file of DeepSpeed's says, and the optimizer that ZeRO parts.

    Raises:
        ConfigError: The file cannot be read, is of another stage, or of one that does not fit the other keys.
    """
    keys: dict[str, Any] = {}
    if config.deepspeed is not None:
        of_file = f"zero{stage_of_file(Path(config.deepspeed))}"
        if config.distributed not in ("auto", of_file):
            raise ConfigError(
                f"{config.deepspeed} is of another stage",
                found=f"{of_file}, distributed: {config.distributed}",
                hint="leave distributed out",
            )
        keys["distributed"] = of_file
    if (config.distributed.startswith("zero") or keys) and config.optim is None:
        keys["optim"] = TrainingOptions.optim
    resolved: RunConfig = config.model_copy(update=keys)
    # What contradicts the file's stage is told as if the key had been given.
    found = [f"{each.what}; {each.hint}" for each in distributed_contradictions(resolved)]
    if found:
        raise ConfigError(f"{config.deepspeed} does not fit this run", found="\n".join(found))
    return resolved


def device(config: RunConfig) -> torch.device:
    """Where the run computes. Raises ConfigError for a GPU that is not there."""
    if config.device == "auto":
        return default_device()
    chosen = torch.device(config.device)
    count = torch.cuda.device_count()
    if chosen.type == "cuda" and (chosen.index or 0) >= count:
        raise ConfigError(
            "device is not there",
            found=config.device,
            allowed=["auto", "cpu", *(f"cuda:{index}" for index in range(count))],
            hint="`fourfold env` shows what this machine has",
        )
    return chosen


def memory_limit(config: RunConfig) -> int | None:
    """Bytes of the GPU that the run may take; None: all. Raises ConfigError for no amount."""
    return None if config.gpu_memory_limit is None else parse_bytes(config.gpu_memory_limit)


def merged_dtype(config: RunConfig) -> torch.dtype:
    """What merged weights are written in: fp16 where the run computes in it, else bf16."""
    return torch.float16 if compute_dtype(config) == torch.float16 else torch.bfloat16


def compute_dtype(config: RunConfig, *, for_training: bool = False) -> torch.dtype:
    """What the run computes in. Raises ConfigError for fp16 training on a CPU."""
    if config.bnb_4bit_compute_dtype == "auto":
        return default_dtype(device(config))
    dtype: torch.dtype = getattr(torch, config.bnb_4bit_compute_dtype)
    if for_training and dtype == torch.float16 and device(config).type == "cpu":
        raise ConfigError(
            "training in fp16, with its loss scaled, takes a GPU",
            found="bnb_4bit_compute_dtype: float16, device: cpu",
            allowed=["bfloat16", "float32", "auto"],
        )
    return dtype


def quantization(config: RunConfig) -> FourfoldConfig | None:
    """How the base is quantized; None: not at all."""
    if not config.quantizes:
        return None
    # The head that gives scores is new, and learns.
    kept = [*config.modules_to_not_convert, *(["score"] if config.method == "reward" else [])]
    if config.load_in_8bit:
        return FourfoldConfig(
            load_in_8bit=True,
            llm_int8_threshold=config.llm_int8_threshold,
            modules_to_not_convert=kept,
            quantize_lm_head=config.quantize_lm_head,
        )
    return FourfoldConfig(
        bnb_4bit_quant_type=config.bnb_4bit_quant_type,
        bnb_4bit_use_double_quant=config.bnb_4bit_use_double_quant,
        bnb_4bit_blocksize=config.bnb_4bit_blocksize,
        modules_to_not_convert=kept,
        quantize_lm_head=config.quantize_lm_head,
        quantize_embeddings=config.quantize_embeddings,
        calibration=config.calibration,
    )


def load_options(
    config: RunConfig, *, for_training: bool = False, streams: bool = False, is_shared: bool = False
) -> dict[str, Any]:
    """The keyword arguments of `load_model`.

    Args:
        streams: What is loaded is given to `stream_options` then.
        is_shared: It is shared by the processes of the run.
    """
    row = distributed_row(config.distributed, processes().count)
    # So that no moment holds on the GPU a base that streams, or one of which a process keeps its share.
    waits = (streams and config.stream_base) or (is_shared and row.loads_on == "cpu")
    return {
        "quantization": quantization(config),
        "dtype": compute_dtype(config, for_training=for_training),
        "device": torch.device("cpu") if waits else device(config),
        "revision": config.model_revision,
        "attn_implementation": config.attn_implementation,
        "num_labels": 1 if config.method == "reward" else None,
    }


def stream_options(config: RunConfig) -> dict[str, Any]:
    """The keyword arguments of `prepare` and `load_adapter` that say how the base streams."""
    return {"stream_base": config.stream_base, "device": device(config)}


def lora_config(config: RunConfig) -> LoraConfig:
    """PEFT's configuration; initialisations that read the base weight are `prepare`'s to do."""
    is_reward = config.method == "reward"
    simple = config.init_lora_weights in (True, "gaussian")
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        init_lora_weights=config.init_lora_weights if simple else True,
        target_modules=config.target_modules,
        modules_to_save=[*config.modules_to_save, *(["score"] if is_reward else [])] or None,
        task_type="SEQ_CLS" if is_reward else "CAUSAL_LM",
    )


def data_options(config: RunConfig, *, packing: bool | None = None) -> DataOptions:
    row_format: str | None = None if config.row_format == "auto" else config.row_format
    if config.method == "pretrain":
        row_format = "text"
    is_compared = config.method in PREFERENCE_ROWS
    return DataOptions(
        max_length=config.max_length,
        train_on_prompt=config.train_on_prompt,
        overlong=config.overlong,
        row_format=row_format,
        columns=config.columns or None,
        kinds=(PREFERENCE_ROWS[config.method].kind,) if is_compared else ("conversation", "document"),
        packing=config.packing if packing is None else packing,
        num_proc=config.dataset_num_proc,
    )


def data_sources(config: RunConfig) -> list[DataSource]:
    """The data sets of train_dataset. Raises ConfigError where some have a weight and others none."""
    given = config.train_dataset
    assert given is not None
    if isinstance(given, str):
        return [DataSource(given)]
    sources = [
        DataSource(**(entry.model_dump() | {"row_format": None if entry.row_format == "auto" else entry.row_format}))
        for entry in given
    ]
    check_weights(sources)
    return sources


def eval_datasets(config: RunConfig) -> dict[str, str]:
    """Paths of the sets of held-out rows by name; one that needs no name has ""."""
    given = config.eval_dataset
    if given is None:
        return {}
    return {"": given} if isinstance(given, str) else given


def generation_options(config: RunConfig) -> GenerationOptions:
    """Of the comparison by generation: greedy, so that it can be repeated."""
    return GenerationOptions(
        max_new_tokens=config.eval_max_new_tokens, batch_size=config.eval_generate_batch_size, seed=config.seed
    )


def evaluation_options(config: RunConfig) -> EvaluationOptions:
    """What a model is measured by."""
    include = config.harness_include_path
    return EvaluationOptions(
        batch_size=config.per_device_eval_batch_size,
        generate_rows=config.eval_generate_rows,
        generation=generation_options(config),
        comparison=config.eval_comparison,
        pattern=config.eval_pattern,
        text_metrics=tuple(config.eval_metrics),
        perplexity_text=None if config.perplexity_text is None else Path(config.perplexity_text),
        perplexity_max_length=config.perplexity_max_length,
        perplexity_stride=config.perplexity_stride,
        perplexity_max_tokens=config.perplexity_max_tokens,
        choices_source=config.multiple_choice_dataset,
        choices_rows=config.multiple_choice_rows,
        apply_chat_template=config.eval_apply_chat_template,
        harness=HarnessOptions(
            tasks=tuple(config.harness_tasks),
            include_path=None if include is None else Path(include),
            num_fewshot=config.harness_num_fewshot,
            limit=config.harness_limit,
            seed=config.seed,
        ),
    )


def method_options(config: RunConfig) -> MethodOptions:
    """What is learned; a key that is null has the default of `MethodOptions`."""
    names = [config.loss_type] if isinstance(config.loss_type, str) else config.loss_type
    given = {
        "beta": config.beta,
        "loss_type": None if names is None else tuple(names),
        "loss_weights": None if config.loss_weights is None else tuple(config.loss_weights),
        "label_smoothing": config.label_smoothing,
        "precompute_ref_log_probs": config.precompute_ref_log_probs,
        "desirable_weight": config.desirable_weight,
        "undesirable_weight": config.undesirable_weight,
        "center_rewards_coefficient": config.center_rewards_coefficient,
    }
    chosen: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    return MethodOptions(method=config.method, **chosen)


def best_options(config: RunConfig) -> BestOptions:
    """Which evaluation is the best. Raises ConfigError for a figure that the method's evaluations do not have."""
    metric = "eval_" + (config.metric_for_best_model or "loss").removeprefix("eval_")
    prefixes = [prefix_of(name) for name in eval_datasets(config)] or [prefix_of("")]
    figures = [f"{prefix}_{figure}" for prefix in prefixes for figure in FIGURES[config.method]]
    best = BestOptions(
        load_at_end=config.load_best_model_at_end,
        metric=metric,
        greater_is_better=config.greater_is_better,
        patience=config.early_stopping_patience,
        threshold=config.early_stopping_threshold,
    )
    if best.is_asked_for and metric not in figures:
        raise ConfigError("metric_for_best_model is no figure of the evaluations", found=metric, allowed=figures)
    return best


def group_options(config: RunConfig) -> GroupOptions:
    """Which parameters have a learning rate of their own."""
    given = {"loraplus_lr_ratio": config.loraplus_lr_ratio, "loraplus_lr_embedding": config.loraplus_lr_embedding}
    rates = {key: value for key, value in given.items() if value is not None}
    groups = [
        LrGroup(tuple(group.modules), group.lr, group.name or ", ".join(group.modules))
        for group in config.lr_groups or ()
    ]
    return GroupOptions(lr_groups=tuple(groups), **rates)


def training_options(config: RunConfig) -> TrainingOptions:
    """Raises ConfigError as `best_options`."""
    has_eval_rows = config.eval_dataset is not None or config.eval_split_fraction > 0

    def rhythm(steps: int | None) -> tuple[str, int]:
        if steps is None and config.streaming:
            # A stream's epoch may never end.
            return "steps", max(1, (config.max_steps or 1) // 10)
        return ("epoch", 1) if steps is None else ("steps", steps)

    eval_strategy, eval_steps = rhythm(config.eval_steps) if has_eval_rows else ("no", 1)
    save_strategy, save_steps = rhythm(config.save_steps)
    return TrainingOptions(
        output_dir=Path(config.output_dir),
        num_train_epochs=config.num_train_epochs or 1.0,
        max_steps=config.max_steps or -1,
        per_device_train_batch_size=config.per_device_train_batch_size,
        per_device_eval_batch_size=config.per_device_eval_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_ratio=config.warmup_ratio or 0.0,
        warmup_steps=config.warmup_steps or 0,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optim or TrainingOptions.optim,
        logging_steps=config.logging_steps,
        eval_strategy=eval_strategy,
        eval_steps=eval_steps,
        save_strategy=save_strategy,
        save_steps=save_steps,
        save_total_limit=config.save_total_limit,
        gradient_checkpointing=config.gradient_checkpointing,
        # The model is loaded in the dtype it computes in; autocast would only cast what is cast already. fp16 brings
        # the scaling of the loss along.
        compute_dtype="float16" if compute_dtype(config, for_training=True) == torch.float16 else "float32",
        seed=config.seed,
        report_to=tuple(config.report_to),
        run_name=config.run_name or Path(config.output_dir).resolve().name,
        project=config.project,
        dataloader_num_workers=config.dataloader_num_workers,
        group_by_length=config.group_by_length,
        use_cpu=device(config).type == "cpu",
        neftune_noise_alpha=config.neftune_noise_alpha,
        groups=group_options(config),
        best=best_options(config),
        distributed=config.distributed,
        ddp_timeout=config.ddp_timeout,
        distributed_offload=config.distributed_offload,
        deepspeed=None if config.deepspeed is None else Path(config.deepspeed),
        model_dtype=str(compute_dtype(config)).removeprefix("torch."),
    )
