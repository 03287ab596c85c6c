"""The whole flow on one page: read data, load, adapt, train, evaluate; then merge, inspect, chat."""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import transformers
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fourfold.adapters.initialisation import changes_base
from fourfold.config import RunConfig, load_config
from fourfold.config import options as choices
from fourfold.data import Collator, PreparedData, check_tokenizer, load_rows
from fourfold.data import prepare as prepare_rows
from fourfold.errors import CheckpointError, ConfigError, DataError
from fourfold.evaluation import Sample, exact_match, perplexity, validation_loss
from fourfold.export.merging import ONTO, MergeReport, write_merged
from fourfold.files import whole_folder
from fourfold.inference import GenerationOptions, Message, stream_reply
from fourfold.models.loading import load_model, load_tokenizer
from fourfold.models.preparing import load_adapter, prepare
from fourfold.models.size import ModelSize, model_size
from fourfold.quantization.inspection import Inspection, inspect_checkpoint
from fourfold.training import run_folder
from fourfold.training.checkpoint import list_checkpoints
from fourfold.training.progress import ProgressCallback, ProgressStyle
from fourfold.training.trainer import build_trainer

__all__ = ["Run", "chat", "evaluate", "inspect", "merge", "quantize_checkpoint", "train"]

PROGRESS: dict[str, ProgressStyle] = {
    "terminal": ProgressStyle.LIVE,
    "plain": ProgressStyle.PLAIN,
    "json": ProgressStyle.JSON,
    "silent": ProgressStyle.SILENT,
}


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


def train(config: RunConfig, progress: str = "plain") -> Run:
    """Fine-tune a model as the configuration says, and leave a run folder.

    Raises:
        FourfoldError: Whatever does not fit, found as early as it can be; a run that was there before is untouched.
    """
    output = _claim_output_dir(config)
    say = _Speaker(progress)
    tokenizer = _tokenizer(config)
    train_data, eval_data = _read_data(config, tokenizer)
    for data in (train_data, eval_data):
        say.lines(data.report.lines() if data else [])
    model = load_model(config.model_name_or_path, **choices.load_options(config, for_training=True))
    say.lines(model_size(model).lines())
    # Here, so that the adapter starts alike however the base was loaded.
    transformers.set_seed(config.seed)
    adapted = _adapt(config, model)
    trainer = build_trainer(
        adapted,
        tokenizer,
        train_data.dataset,
        eval_data.dataset if eval_data else None,
        Collator(tokenizer.pad_token_id, width=config.max_length if config.packing else None),
        choices.training_options(config, has_eval_rows=eval_data is not None),
        callbacks=[run_folder.MetricsCallback(output), ProgressCallback(PROGRESS[progress])],
    )
    run_folder.write_config(output, config.to_yaml())
    result = trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    _save(config, output, adapted, tokenizer)
    metrics = {"train_loss": result.training_loss, "train_seconds": result.metrics["train_runtime"]}
    metrics |= _last_metrics(output)
    measured, samples = _measure(config, adapted, tokenizer, eval_data, say, with_loss=False)
    metrics |= measured
    records = run_folder.read_metrics(output / run_folder.METRICS_FILE)
    run_folder.draw_loss(output / run_folder.LOSS_PICTURE, records, title=Path(config.model_name_or_path).name)
    _write_card(config, output, train_data, eval_data, metrics, len(list_checkpoints(output)))
    return Run(output, metrics, samples)


def evaluate(config: RunConfig, progress: str = "plain") -> dict[str, Any]:
    """Measure a run's adapter, or where there is none the base model: loss, exact match, perplexity."""
    metrics, _ = evaluate_with_samples(config, progress)
    return metrics


def evaluate_with_samples(config: RunConfig, progress: str = "plain") -> tuple[dict[str, Any], list[Sample]]:
    """`evaluate`, and the rows that were compared by generation."""
    tokenizer = _tokenizer(config)
    model: PreTrainedModel | PeftModel = load_model(_base_of(config), **choices.load_options(config))
    adapter = Path(config.output_dir) / run_folder.ADAPTER_FOLDER
    if config.adapter is not None and adapter.is_dir():
        model = load_adapter(model, adapter)
    _, eval_data = _read_data(config, tokenizer, only_eval=True)
    if eval_data is None and config.perplexity_text is None:
        raise ConfigError(
            "there is nothing to evaluate on", allowed=["eval_dataset", "eval_split_fraction", "perplexity_text"]
        )
    return _measure(config, model, tokenizer, eval_data, _Speaker(progress), with_loss=True)


def quantize_checkpoint(config: RunConfig, out: Path) -> ModelSize:
    """Write the quantized checkpoint of a model, its tokenizer beside it, whole or not at all."""
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty", hint="give a new folder")
    model = load_model(config.model_name_or_path, **choices.load_options(config))
    with whole_folder(out) as partial:
        model.save_pretrained(partial)
        load_tokenizer(config.model_name_or_path, revision=config.model_revision).save_pretrained(partial)
    return model_size(model)


def inspect(config: RunConfig) -> Inspection:
    """What quantizing does to each layer of a checkpoint."""
    quantization = choices.load_options(config)["quantization"]
    if quantization is None:
        raise ConfigError("there is nothing to inspect without quantization", found="load_in_4bit: false")
    return inspect_checkpoint(Path(config.model_name_or_path), quantization)


def merge(adapter: str, out: Path, onto: str = "dequantized", bound: float | None = None) -> MergeReport:
    """Merge a run's adapter into its base and write an ordinary 16-bit model, if its logits are the trained model's.

    Args:
        adapter: Folder of a run.
        out: Folder to write; must not exist, or be empty.
        onto: A key of `ONTO`.
        bound: Largest relative error of the logits.
    """
    if onto not in ONTO:
        raise ConfigError("unknown base to merge onto", found=onto, allowed=ONTO)
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty", hint="give a new folder")
    config, folder = _run_of(adapter)
    options = choices.load_options(config)
    tokenizer = load_tokenizer(folder)
    trained = load_adapter(load_model(_base_of(config), **options), folder)

    def load_original() -> PeftModel:
        if _base_of(config) != config.model_name_or_path:
            raise ConfigError(
                "this adapter belongs to a base that its initialisation changed",
                found=f"init_lora_weights: {config.init_lora_weights}",
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

    return write_merged(
        trained,
        tokenizer,
        _merge_prompts(config, tokenizer),
        out,
        onto=onto,
        load_original=load_original,
        bound=bound,
    )


@dataclass(frozen=True)
class ChatSession:
    """A model that answers."""

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    options: GenerationOptions

    def reply(self, messages: list[Message]) -> Iterator[str]:
        """The next assistant turn, piece by piece."""
        return stream_reply(self.model, self.tokenizer, messages, self.options)


def chat(
    model: str, *, max_new_tokens: int = 512, temperature: float = 0.0, top_p: float = 1.0, seed: int = 0
) -> ChatSession:
    """Open a conversation with a run's result, or with any model."""
    options = GenerationOptions(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
    if not (Path(model) / run_folder.CONFIG_FILE).is_file() and not (Path(model) / "adapter_config.json").is_file():
        return ChatSession(load_model(model), load_tokenizer(model), options)
    config, folder = _run_of(model)
    base = load_model(_base_of(config), **choices.load_options(config))
    return ChatSession(load_adapter(base, folder), load_tokenizer(folder), options)


class _Speaker:
    """Prints what happens before and after training, where progress is for people."""

    def __init__(self, progress: str) -> None:
        self.is_heard = progress in ("terminal", "plain")

    def lines(self, lines: list[str]) -> None:
        for line in lines if self.is_heard else []:
            sys.stdout.write(line + "\n")
        sys.stdout.flush()


def _claim_output_dir(config: RunConfig) -> Path:
    output = Path(config.output_dir)
    holds_run = (output / run_folder.METRICS_FILE).exists() or bool(list_checkpoints(output))
    if holds_run and config.resume_from_checkpoint is None and not config.overwrite_output_dir:
        raise ConfigError(
            f"output_dir {output} holds a run already",
            hint="go on with --resume_from_checkpoint auto, start anew with --overwrite_output_dir, or name another",
        )
    if config.train_dataset is None:
        raise ConfigError("train_dataset is not given", hint="name a JSON-lines file, or a data set on the hub")
    output.mkdir(parents=True, exist_ok=True)
    return output


def _tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    tokenizer = load_tokenizer(config.model_name_or_path, revision=config.model_revision)
    if config.chat_template is not None:
        tokenizer.chat_template = config.chat_template
    if config.pad_token is not None:
        if config.pad_token not in tokenizer.get_vocab():
            raise DataError(
                "pad_token is not in the tokenizer's vocabulary",
                found=config.pad_token,
                hint="choose a token that is there, such as one of its special tokens",
            )
        tokenizer.pad_token = config.pad_token
    check_tokenizer(tokenizer)
    return tokenizer


def _read_data(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, *, only_eval: bool = False
) -> tuple[PreparedData, PreparedData | None]:
    """Training rows and, where asked for, held-out ones. Held-out rows are never packed: each is scored by itself."""
    held_out: Dataset | None = load_rows(config.eval_dataset, "test") if config.eval_dataset else None
    rows: Dataset | None = None
    if config.train_dataset is not None and (held_out is None or not only_eval):
        rows = load_rows(config.train_dataset)
        if held_out is None and config.eval_split_fraction > 0:
            parts = rows.train_test_split(test_size=config.eval_split_fraction, seed=config.seed)
            rows, held_out = parts["train"], parts["test"]
    eval_data = None
    if held_out is not None:
        eval_data = prepare_rows(held_out, tokenizer, choices.data_options(config, packing=False), "held-out rows")
    if only_eval:
        return eval_data, eval_data  # type: ignore[return-value]  # the first is not looked at
    assert rows is not None
    return prepare_rows(rows, tokenizer, choices.data_options(config), "training rows"), eval_data


def _adapt(config: RunConfig, model: PreTrainedModel) -> PeftModel:
    if config.adapter is None:
        raise ConfigError("full fine-tuning is not there yet", found="adapter: null", allowed="adapter: lora")
    method = config.init_lora_weights
    reading = method if isinstance(method, str) and method != "gaussian" else None
    original = Path(config.model_name_or_path)
    has_original = reading is not None and config.load_in_4bit and original.is_dir() and not _is_quantized(original)
    return prepare(
        model,
        choices.lora_config(config),
        init_lora_weights=reading,
        original=original if has_original else None,
        loftq_iterations=config.loftq_iterations,
    )


def _is_quantized(folder: Path) -> bool:
    return '"quantization_config"' in (folder / "config.json").read_text()


def _save(config: RunConfig, output: Path, model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The adapter and, where its initialisation changed the base, that base, to which alone it belongs."""
    if config.load_in_4bit and changes_base(config.init_lora_weights, config.loftq_iterations):
        base = output / "base"
        with whole_folder(base) as partial:
            model.get_base_model().save_pretrained(partial, state_dict=_base_state(model))
            tokenizer.save_pretrained(partial)
        model.peft_config["default"].base_model_name_or_path = str(base)
    run_folder.save_adapter(output, model, tokenizer)


def _base_state(model: PeftModel) -> dict[str, Any]:
    """The state dict of the base under its own names, without the adapter's entries."""
    state = model.get_base_model().state_dict()
    return {name.replace(".base_layer.", "."): value for name, value in state.items() if ".lora_" not in name}


def _base_of(config: RunConfig) -> str:
    """The base a run's adapter belongs to: the one in its folder, if its initialisation changed it."""
    own = Path(config.output_dir) / "base"
    return str(own) if own.is_dir() and config.adapter is not None else config.model_name_or_path


def _run_of(folder: str) -> tuple[RunConfig, Path]:
    """Configuration and adapter folder of a run, given its folder or its adapter's."""
    path = Path(folder)
    for run in (path, path.parent):
        if (run / run_folder.CONFIG_FILE).is_file():
            # A run that was moved is where it is now, not where its configuration says.
            config = load_config(str(run), [f"--output_dir={run}"])
            adapter = path if (path / "adapter_config.json").is_file() else run / run_folder.ADAPTER_FOLDER
            return config, adapter
    raise CheckpointError(
        f"no run at {folder}",
        allowed=f"a folder with {run_folder.CONFIG_FILE} and {run_folder.ADAPTER_FOLDER}/, as train leaves it",
    )


def _measure(
    config: RunConfig,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    eval_data: PreparedData | None,
    say: _Speaker,
    *,
    with_loss: bool,
) -> tuple[dict[str, Any], list[Sample]]:
    metrics: dict[str, Any] = {}
    samples: list[Sample] = []
    if eval_data is not None and with_loss:
        collator = Collator(tokenizer.pad_token_id)
        loss = validation_loss(model, eval_data.dataset, collator, config.per_device_eval_batch_size)
        metrics |= {"eval_loss": loss.loss, "eval_num_tokens": loss.num_tokens}
    if eval_data is not None and config.eval_generate_rows > 0:
        conversations = [row["messages"] for row in eval_data.dataset.select_columns("messages")]
        chosen = conversations[: config.eval_generate_rows]
        say.lines([f"answering {len(chosen)} held-out rows"])
        matched = exact_match(
            model, tokenizer, chosen, choices.generation_options(config), normalise=config.eval_comparison
        )
        metrics |= {"exact_match": matched.score, "exact_match_rows": matched.num_rows}
        samples = matched.samples
    if config.perplexity_text is not None:
        text = Path(config.perplexity_text)
        if not text.is_file():
            raise DataError(f"no such file: {text}", hint="key perplexity_text names a text file")
        measured = perplexity(
            model,
            tokenizer,
            text.read_text(encoding="utf-8"),
            max_length=config.perplexity_max_length,
            stride=config.perplexity_stride,
            max_tokens=config.perplexity_max_tokens,
        )
        metrics |= {"perplexity": measured.value, "perplexity_num_tokens": measured.num_tokens}
    return metrics, samples


def _last_metrics(output: Path) -> dict[str, Any]:
    """The last evaluation loss, the highest memory and the median speed that the run logged."""
    records = run_folder.read_metrics(output / run_folder.METRICS_FILE)
    last: dict[str, Any] = {}
    for key, choose in (("eval_loss", lambda v: v[-1]), ("memory_peak_bytes", max), ("tokens_per_second", _median)):
        values = [record[key] for record in records if record.get(key) is not None]
        if values:
            last[key] = choose(values)
    return last


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def _merge_prompts(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Real conversations of the run, at most eight and 512 tokens: prompts with their answers."""
    source = config.eval_dataset or config.train_dataset
    assert source is not None
    rows = load_rows(source, "test" if config.eval_dataset else "train")
    rows = rows.select(range(min(8, len(rows))))
    prepared = prepare_rows(rows, tokenizer, choices.data_options(config, packing=False), "prompts")
    budget = math.ceil(512 / len(prepared.dataset))
    return [row["input_ids"][:budget] for row in prepared.dataset]


def _write_card(
    config: RunConfig,
    output: Path,
    train_data: PreparedData,
    eval_data: PreparedData | None,
    metrics: dict[str, Any],
    num_checkpoints: int,
) -> None:
    values = config.model_dump()

    def chosen(*prefixes: str) -> dict[str, Any]:
        return {key: value for key, value in values.items() if key.startswith(prefixes) and value is not None}

    data = {"train_dataset": config.train_dataset, "training rows": train_data.report.rows_kept}
    data["rows above max_length"] = train_data.report.rows_overlong
    if eval_data is not None:
        data |= {
            "held out": config.eval_dataset or "a part of train_dataset",
            "held-out rows": eval_data.report.rows_kept,
        }
    run_folder.write_model_card(
        output,
        run_folder.ModelCard(
            name=output.name,
            base_model=config.model_name_or_path,
            data=data,
            quantization=chosen("load_in_4bit", "bnb_", "quantize_", "modules_to_not"),
            lora=chosen("lora_", "use_", "target_", "init_lora"),
            hyperparameters={
                **chosen("num_train", "max_steps", "per_device_train", "gradient_", "learning_", "lr_", "warmup_"),
                **chosen("weight_decay", "max_grad", "optim", "seed", "max_length", "packing"),
            },
            results={**metrics, "checkpoints kept": num_checkpoints},
            command=shlex.join(["fourfold", "train", f"{output}/{run_folder.CONFIG_FILE}"]),
        ),
    )


def samples_as_dicts(samples: list[Sample]) -> list[dict[str, Any]]:
    """Samples as JSON can hold them."""
    return [asdict(sample) for sample in samples]
