"""The whole flow on one page: read data, load, adapt, train, evaluate; then merge, inspect, chat."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel
from transformers import PreTrainedModel, TrainerCallback

from fourfold.adapting import adapt, save_base, save_result
from fourfold.chatting import ChatSession, chat
from fourfold.comparing import compare_answers, preferences_of, trainer_for
from fourfold.config import RunConfig
from fourfold.config import options as choices
from fourfold.config.card import model_card
from fourfold.config.methods import PREFERENCE_METHODS
from fourfold.errors import CheckpointError, ConfigError
from fourfold.evaluation import Sample
from fourfold.export.merging import ONTO, MergeReport, write_merged
from fourfold.files import whole_folder
from fourfold.inputs import (
    BASE_FOLDER,
    base_of,
    checkpoint_folder,
    find_run,
    merge_prompts,
    read_data,
    read_held_out,
    read_tokenizer,
    require_free,
    write_base,
)
from fourfold.kernels.host_memory import spare_bytes
from fourfold.limiting import limit_of, within_limit
from fourfold.measuring import account_memory, check_measures, measure, planned_memory, require_measures, summary
from fourfold.memory.gpus import gpu_present
from fourfold.memory.meter import memory_used, reset_peak
from fourfold.models.block import set_recomputation
from fourfold.models.checkpoint_files import check_checkpoint
from fourfold.models.loading import load_model, load_tokenizer
from fourfold.models.preparing import load_adapter
from fourfold.models.size import ModelSize, model_size
from fourfold.models.streaming import stream_base
from fourfold.models.underlying import underlying
from fourfold.planning import (
    kept_to,
    left_for,
    parallelism_in_force,
    plan_for_training,
    require_planned_shape,
    step_down,
)
from fourfold.prompting import add_samples, prompts_of
from fourfold.quantization.inspection import Inspection, inspect_checkpoint
from fourfold.recording import Recorder
from fourfold.run_start import claim_output_dir, clear_former_run, going_on, resumption
from fourfold.telling import PROGRESS, Speaker, tracked
from fourfold.together import least_of_all, require_alike, together
from fourfold.training import run_folder
from fourfold.training.best import best_of
from fourfold.training.evaluation_sets import prefix_of
from fourfold.training.lifeline import Lifeline
from fourfold.training.options import TrainingOptions
from fourfold.training.out_of_memory import (
    OutOfMemory,
    compare_parts,
    parts_in_use,
    reporting_out_of_memory,
)
from fourfold.training.progress import ProgressCallback
from fourfold.training.requantizing import RequantizeCallback
from fourfold.training.trackers import send_final
from fourfold.training.trainer import FourfoldTrainer

__all__ = [
    "ChatSession",
    "Run",
    "chat",
    "evaluate",
    "evaluate_with_samples",
    "inspect",
    "merge",
    "quantize_checkpoint",
    "train",
]


@dataclass(frozen=True)
class Run:
    """What a run leaves.

    Args:
        output_dir: The run folder.
        metrics: Final figures by name.
        samples: Held-out rows with the answers given, if rows were compared by generation.
    """

    output_dir: Path
    metrics: dict[str, Any]
    samples: list[Sample] = field(default_factory=list)


@tracked
def train(config: RunConfig, progress: str = "plain", callbacks: Sequence[TrainerCallback] = ()) -> Run:
    """Fine-tune a model as the configuration says, and leave a run folder.

    Started by torchrun or accelerate, all processes call this, and the main one alone writes and tells.

    Args:
        config: The run.
        progress: A key of `PROGRESS`.
        callbacks: More for the trainer, behind the run's own.

    Raises:
        FourfoldError: Whatever does not fit, found as early as it can be; a run that was there before is untouched.
        TrainingInterrupted: SIGINT or SIGTERM came; a checkpoint was saved.
    """
    config = choices.with_deepspeed(config)
    with together(config) as lifeline:
        return _train(config, progress, lifeline, callbacks)


@within_limit
def _train(config: RunConfig, progress: str, lifeline: Lifeline, more: Sequence[TrainerCallback]) -> Run:
    own = lifeline.own
    progress = progress if own.is_main else "silent"
    say = Speaker(progress)
    device = choices.device(config)
    output, checkpoint = claim_output_dir(config)
    require_alike("the checkpoint to go on from", checkpoint)
    check_measures(config)
    asked = going_on(config, checkpoint)
    say.result("resume", resumption(asked, checkpoint))
    gpu = gpu_present(device, choices.memory_limit(config)) if device.type == "cuda" else None
    gpu, host_bytes = least_of_all(own, gpu, spare_bytes())
    planned = plan_for_training(asked, gpu, host_bytes, parallelism_in_force(asked, own.count))
    config = kept_to(asked, planned)
    options = choices.training_options(config)
    say.result("plan", planned)
    tokenizer = read_tokenizer(config)
    with lifeline.main_first():
        train_data, eval_data = read_data(config, tokenizer)
    prompts = prompts_of(config, tokenizer, eval_data)
    for data in (train_data, *eval_data.values()):
        say.result("data", data.report)
    # A resumed run goes on upon the base that its initialisation left, not upon one made anew.
    base = config.model_name_or_path
    if checkpoint is not None:
        former = [folder / BASE_FOLDER for folder in (checkpoint, checkpoint.parent)]
        base = next((str(folder) for folder in former if folder.is_dir()), base)
    with reporting_out_of_memory("the model was loaded", "4 bits (load_in_4bit), or a base that streams (stream_base)"):
        # A head that gives scores is new: it is drawn now.
        transformers.set_seed(config.seed)
        model = load_model(base, **choices.load_options(config, for_training=True, streams=True, is_shared=True))
        size = model_size(model)
        say.result("model", size)
        # Here, so that the adapter starts alike however the base was loaded.
        transformers.set_seed(config.seed)
        adapted = adapt(config, model, is_initialised=checkpoint is not None)
    if planned is not None:
        require_planned_shape(config, adapted)

    recorder = Recorder(output, is_main=own.is_main)

    def trainer_of(options: TrainingOptions) -> FourfoldTrainer:
        telling = ProgressCallback(PROGRESS[progress])
        callbacks: list[Any] = [run_folder.MetricsCallback(output), telling, recorder.callback(), *more]
        if config.requantize_every is not None:
            write = partial(write_base, adapted, tokenizer)
            callbacks.append(RequantizeCallback(config.requantize_every, config.calibration, write))
        made = trainer_for(config, adapted, tokenizer, train_data, eval_data, options, callbacks)
        add_samples(config, made, tokenizer, prompts, telling)
        return made

    trainer = trainer_of(options)
    if checkpoint is None and own.is_main:
        clear_former_run(output)
    # How this run was started is no part of what it is: made again from its folder, it starts like any other.
    # Its optimizer is: state of another does not go on.
    started = {"resume_from_checkpoint": None, "overwrite_output_dir": False, "optim": config.optim}
    if own.is_main:
        run_folder.write_config(output, asked.model_copy(update=started).to_yaml())
    held_out = {f"Held-out rows{f': {name}' if name else ''}": data.report for name, data in eval_data.items()}
    recorder.begin(checkpoint, {"Training rows": train_data.report, **held_out}, size, planned_memory(planned))
    if isinstance(adapted, PeftModel) and own.is_main:
        save_base(config, output, adapted, tokenizer)
    if gpu is not None:
        # The peak of loading is another matter.
        reset_peak(device)
    while True:
        try:
            with recorder.watching():
                result = trainer.train(resume_from_checkpoint=checkpoint)
            break
        except OutOfMemory as error:
            now = left_for(asked, device, error.standing_bytes)
            smaller = step_down(asked, planned, now) if planned and asked.on_out_of_memory == "step_down" else None
            if planned is None or planned.chosen is None or smaller is None or own.are_several:
                raise
            for line in (str(error), *compare_parts(planned.chosen.footprint.parts, error.parts)):
                say.line(line)
            checkpoint = error.checkpoint
        planned, config = smaller, kept_to(asked, smaller)
        say.result("plan", planned)
        recorder.step_down(checkpoint, planned_memory(planned))
        if config.recompute is None:
            # The next trainer has layers on the generic path checkpoint, if that was planned.
            underlying(adapted).gradient_checkpointing_disable()
        else:
            set_recomputation(adapted, config.recompute)
        # With what it holds: its optimizer's state, and cycles that keep it.
        del trainer
        gc.collect()
        reset_peak(device)
        trainer = trainer_of(choices.training_options(config))
    parts = parts_in_use(adapted, trainer.optimizer, memory_used(device).peak_bytes)
    memory = account_memory(planned, parts, say.line, is_sum=device.type == "cuda")
    if config.adapter_weight != 1:
        trainer.weigh_adapter(config.adapter_weight)
        say.line(f"adapter weighed by {config.adapter_weight:g}: all that follows is of it")
    weights = trainer.whole_weights()
    if own.is_main:
        save_result(config, output, adapted, tokenizer, weights)
    best = best_of(trainer)
    # What is left is the model as it was after this step.
    step, metrics_file = best.get("best_step", trainer.state.global_step), output / run_folder.METRICS_FILE
    lost = {f"{prefix_of(name)}_loss" for name in eval_data}
    logged = {key for record in trainer.state.log_history if record["step"] == step for key in record}
    # What is logged is of the adapter as it trained.
    is_evaluated = lost <= logged and config.adapter_weight == 1
    # Evaluation every so many steps may have ended before the last one.
    hint = f"what was trained is in {output}; `fourfold evaluate` with smaller eval_ batch sizes measures it"
    with reporting_out_of_memory("the trained model was measured", hint):
        measured, samples = measure(config, adapted, tokenizer, eval_data, say.line, with_loss=not is_evaluated)
        if not is_evaluated and eval_data:
            measured |= preferences_of(trainer)
    if not own.is_main:
        return Run(output, measured, samples)
    if measured:
        run_folder.append_metrics(metrics_file, run_folder.metrics_record(step, measured))
    records = run_folder.read_metrics(metrics_file)
    evaluated = summary(records, eval_data, step if best else None)
    metrics = evaluated | best | {"train_seconds": result.metrics["train_runtime"]} | memory | measured
    run_folder.draw_loss(output / run_folder.LOSS_PICTURE, records, title=Path(config.model_name_or_path).name)
    reports = {name: data.report for name, data in eval_data.items()}
    card = model_card(config, output, train_data.report, reports, metrics)
    run_folder.write_model_card(output, card)
    send_final(trainer, step, metrics)
    recorder.end(step, metrics, samples)
    return Run(output, metrics, samples)


def evaluate(config: RunConfig, progress: str = "plain") -> dict[str, Any]:
    """Measure what a run trained, or where there is nothing yet the base model: loss, exact match, perplexity."""
    metrics, _ = evaluate_with_samples(config, progress)
    return metrics


@within_limit
def evaluate_with_samples(config: RunConfig, progress: str = "plain") -> tuple[dict[str, Any], list[Sample]]:
    """`evaluate`, and the rows that were compared by generation."""
    say = Speaker(progress)
    require_measures(config)
    result = Path(config.output_dir) / run_folder.result_folder(config.adapter)
    has_result = result.is_dir()
    has_adapter = has_result and config.adapter is not None
    tokenizer = read_tokenizer(config, result if has_result else None)
    eval_data = read_held_out(config, tokenizer)
    for data in eval_data.values():
        say.result("data", data.report)
    base = base_of(config, result) if has_adapter else str(result) if has_result else config.model_name_or_path
    model: PreTrainedModel | PeftModel = load_model(base, **choices.load_options(config, streams=True))
    if has_adapter:
        # The trainer that compares answers takes no model without anything to train.
        trains = config.method in PREFERENCE_METHODS
        model = load_adapter(model, result, is_trainable=trains, **choices.stream_options(config))
        say.line(f"measuring {result} on {base}")
    elif has_result:
        say.line(f"measuring {result}")
    else:
        if config.stream_base is not None:
            stream_base(model, choices.device(config), source=config.stream_base)
        kind = "model" if config.adapter is None else "adapter"
        say.line(f"measuring {base} itself: there is no {kind} in {result}")
    metrics, samples = measure(config, model, tokenizer, eval_data, say.line, with_loss=True)
    return metrics | compare_answers(config, model, tokenizer, eval_data), samples


@within_limit
def quantize_checkpoint(config: RunConfig, out: Path) -> ModelSize:
    """Write the quantized checkpoint of a model, its tokenizer beside it, whole or not at all.

    Raises:
        CheckpointError: `out` is not free, or the model is not whole, or quantized already.
        ConfigError: The configuration asks for no quantization.
        SaveError: The disk is full.
    """
    require_free(out)
    options = choices.load_options(config)
    if options["quantization"] is None:
        raise ConfigError("there is nothing to write without quantization", found="load_in_4bit: false")
    model = load_model(config.model_name_or_path, **options)
    if model.hf_quantizer.pre_quantized:
        raise CheckpointError(f"{config.model_name_or_path} is quantized already", allowed="a 16-bit checkpoint")
    tokenizer = load_tokenizer(config.model_name_or_path, revision=config.model_revision)
    with whole_folder(out) as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return model_size(model)


def inspect(config: RunConfig) -> Inspection:
    """What quantizing does to each layer of a checkpoint."""
    quantization = choices.load_options(config)["quantization"]
    if quantization is None:
        raise ConfigError("there is nothing to inspect without quantization", found="load_in_4bit: false")
    folder = checkpoint_folder(config)
    check_checkpoint(folder)
    return inspect_checkpoint(folder, quantization)


def merge(
    adapter: str,
    out: Path,
    onto: str = "dequantized",
    bound: float | None = None,
    *,
    bound_kl: float | None = None,
    bound_top1: float | None = None,
) -> MergeReport:
    """Merge a run's adapter into its base and write an ordinary 16-bit model, if its logits are the trained model's.

    Args:
        adapter: Folder of a run.
        out: Folder to write; must not exist, or be empty.
        onto: A key of `ONTO`.
        bound: Largest relative error of the logits.
        bound_kl, bound_top1: Of predictions, see `write_merged`.

    Raises:
        CheckpointError: No finished run at `adapter`, or `out` is not free.
        ConfigError: The adapter has no 16-bit base to merge onto.
        VerificationError: Past a bound; nothing is written.
        SaveError: The disk is full; nothing is written.
    """
    if onto not in ONTO:
        raise ConfigError("unknown base to merge onto", found=onto, allowed=ONTO)
    require_free(out)
    run = find_run(adapter)
    config, folder = run.config, run.adapter
    if config.method == "reward":
        raise ConfigError(
            f"the run at {config.output_dir} trained a model that gives scores, and no model that writes",
            hint="PEFT puts its adapter on AutoModelForSequenceClassification",
        )
    if config.adapter is None:
        raise ConfigError(
            f"there is nothing to merge: the run at {config.output_dir} trained all weights",
            hint=f"{folder} is an ordinary model already",
        )
    # Summed, and compared, in fp32: only the weights that are written are rounded.
    options = choices.load_options(config) | {"dtype": torch.float32}
    dtype = choices.merged_dtype(config)
    tokenizer = load_tokenizer(folder)

    def load_original() -> PeftModel:
        if base_of(config, folder) != config.model_name_or_path:
            raise ConfigError(
                "this adapter belongs to a base that its initialisation changed, or requantize_every",
                found=f"init_lora_weights: {config.init_lora_weights}, requantize_every: {config.requantize_every}",
                allowed="--onto dequantized",
            )
        original = load_model(config.model_name_or_path, **{**options, "quantization": None})
        if getattr(original, "is_quantized", False):
            raise ConfigError(
                "the base checkpoint holds no 16-bit weights to merge onto",
                found=config.model_name_or_path,
                allowed="--onto dequantized",
            )
        return load_adapter(original, folder)

    with limit_of(config):
        return write_merged(
            load_adapter(load_model(base_of(config, folder), **options), folder),
            tokenizer,
            merge_prompts(config, tokenizer),
            out,
            dtype=dtype,
            onto=onto,
            load_original=load_original,
            bound=bound,
            bound_kl=bound_kl,
            bound_top1=bound_top1,
        )
