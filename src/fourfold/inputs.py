"""What the verbs start from, by a run's configuration: its folder, tokenizer, rows and base model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from datasets import Dataset
from huggingface_hub import snapshot_download
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from fourfold.config import RunConfig, load_config
from fourfold.config import options as choices
from fourfold.config.methods import PREFERENCE_METHODS
from fourfold.data import DataOptions, PreparedData, check_tokenizer, load_rows
from fourfold.data import prepare as prepare_rows
from fourfold.data.comparing import prepare_preferences
from fourfold.data.mixture import prepare_mixture
from fourfold.data.overlap import count_rows_in
from fourfold.data.sources import DataSource
from fourfold.data.streamed import StreamedData, first_rows, open_stream
from fourfold.errors import CheckpointError, DataError
from fourfold.models.loading import load_tokenizer
from fourfold.quantization.swapping import base_state_dict
from fourfold.training import run_folder
from fourfold.training.checkpoint import list_checkpoints

__all__ = [
    "BASE_FOLDER",
    "FinishedRun",
    "base_of",
    "checkpoint_folder",
    "export_prompts",
    "find_run",
    "merge_prompts",
    "original_checkpoint",
    "prepare_train",
    "read_data",
    "read_held_out",
    "read_tokenizer",
    "require_free",
    "split_rows",
    "write_base",
]

# In the run folder, where the adapter's initialisation or `requantize_every` changed the base; in a checkpoint, where
# the base changes between them.
BASE_FOLDER = "base"


def require_free(out: Path) -> None:
    """Raise CheckpointError unless `out` is a name that is free, or an empty folder."""
    if out.is_file():
        raise CheckpointError(f"{out} is a file", hint="give a new folder")
    if out.exists() and any(out.iterdir()):
        raise CheckpointError(f"{out} is not empty", hint="give a new folder")


def read_tokenizer(config: RunConfig, source: str | Path | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of `source` (default: the model's), with the configuration's chat template and pad token.

    Raises:
        CheckpointError: There is none.
        DataError: It lacks a pad token, or the configured chat template or pad token does not do.
    """
    tokenizer = load_tokenizer(source or config.model_name_or_path, revision=None if source else config.model_revision)
    if config.chat_template is not None:
        tokenizer.chat_template = _template_text(config.chat_template)
    if config.pad_token is not None:
        if config.pad_token not in tokenizer.get_vocab():
            raise DataError(
                "pad_token is not in the tokenizer's vocabulary",
                found=config.pad_token,
                hint="choose a token that is there, such as one of its special tokens",
            )
        tokenizer.pad_token = config.pad_token
    # Whether a chat template is needed is known when the rows are.
    check_tokenizer(tokenizer, kind=None)
    return tokenizer


def _template_text(chat_template: str) -> str:
    if "{" in chat_template:
        return chat_template
    path = Path(chat_template).expanduser()
    if not path.is_file():
        raise DataError(f"no such file: {path}", allowed="Jinja text or a .jinja file", hint="check key chat_template")
    return path.read_text(encoding="utf-8")


def read_data(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase
) -> tuple[PreparedData | StreamedData, dict[str, PreparedData]]:
    """Training rows, or the stream of them, and held-out ones as `read_held_out`; the report of these says how many of
    them stand in the training rows, which of a stream is not known."""
    assert config.train_dataset is not None
    options = choices.data_options(config)
    train_data: PreparedData | StreamedData
    if config.streaming:
        train_data = open_stream(
            choices.data_sources(config),
            tokenizer,
            options,
            buffer_size=config.streaming_buffer_size,
            seed=config.seed,
            stopping_strategy=config.stopping_strategy,
        )
    else:
        train_data = prepare_train(config, tokenizer, options, _loaded(config))
    held_out = read_held_out(config, tokenizer)
    if isinstance(train_data, StreamedData):
        return train_data, held_out
    trained = train_data.dataset
    return train_data, {name: _counted(data, count_rows_in(data.dataset, trained)) for name, data in held_out.items()}


def _counted(data: PreparedData, rows_trained_on: int) -> PreparedData:
    return replace(data, report=replace(data.report, rows_trained_on=rows_trained_on))


def read_held_out(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, PreparedData]:
    """The sets of held-out rows by their names; one that needs no name has "". They are never packed: each row is
    scored by itself."""
    options = choices.data_options(config, packing=False)
    if config.eval_dataset:
        prepare = _preparation(config)
        held_out = {
            name: prepare(load_rows(path, "test"), tokenizer, options, path)
            for name, path in choices.eval_datasets(config).items()
        }
    elif config.eval_split_fraction:
        held_out = {"": _prepare(config, tokenizer, options, _loaded(config), "held-out")}
    else:
        return {}
    kind = "answers to compare" if config.method in PREFERENCE_METHODS else "plain text"
    for key in ("eval_generate_rows", "sample_rows"):
        for data in held_out.values():
            if getattr(config, key) and "messages" not in data.dataset.column_names:
                raise DataError(
                    f"{key} asks for answers, and held-out rows are {kind}",
                    found=data.report.row_format,
                    allowed="conversations",
                    hint=f"leave {key} out, or hold out conversations",
                )
    return held_out


def _preparation(config: RunConfig) -> Callable[..., PreparedData]:
    """What makes the method's rows of those that are read."""
    if config.method in PREFERENCE_METHODS:
        return partial(prepare_preferences, method=config.method)
    return prepare_rows


Parts = list[tuple[DataSource, Dataset, str]]
"""Data sets with their rows and names."""


def _loaded(config: RunConfig) -> Parts:
    return [(source, load_rows(source), source.path) for source in choices.data_sources(config)]


def prepare_train(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, options: DataOptions, parts: Parts
) -> PreparedData:
    """What is trained on of the rows of train_dataset."""
    is_split = not config.eval_dataset and config.eval_split_fraction > 0
    return _prepare(config, tokenizer, options, parts, "train" if is_split else None)


def _prepare(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, options: DataOptions, parts: Parts, part: str | None
) -> PreparedData:
    """The training rows: all of them, or their "train" or "held-out" part."""
    mix = partial(
        prepare_mixture,
        tokenizer=tokenizer,
        options=options,
        seed=config.seed,
        stopping_strategy=config.stopping_strategy,
        prepare_part=_preparation(config),
    )
    if part is None:
        return mix(parts)
    chosen = [
        (
            replace(source, weight=None) if part == "held-out" else source,
            split_rows(rows, name, config)[part],
            f"{name} ({part} part)",
        )
        for source, rows, name in parts
    ]
    try:
        return mix(chosen)
    except DataError:
        # The whole file again: there a faulty row has the number under which a person finds it.
        mix(parts)
        raise


def split_rows(rows: Dataset, name: str, config: RunConfig) -> dict[str, Dataset]:
    """The "train" and the "held-out" part of rows, by eval_split_fraction and the run's seed.

    Raises:
        DataError: There is but one row.
    """
    if len(rows) < 2:
        raise DataError(
            f"data set {name} cannot be split",
            found=f"{len(rows)} row",
            allowed="at least 2 rows where eval_split_fraction is given",
        )
    num_held_out = min(math.ceil(len(rows) * config.eval_split_fraction), len(rows) - 1)
    parts = rows.train_test_split(test_size=num_held_out, seed=config.seed)
    return {"train": parts["train"], "held-out": parts["test"]}


def merge_prompts(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Real conversations of the run, at most eight and 512 tokens: prompts with their answers."""
    rows = _comparable(config, tokenizer, 8)
    budget = math.ceil(512 / len(rows))
    return [ids[:budget] for ids in rows]


def export_prompts(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The same, of at most 256 tokens each, so many that they have 1,000 tokens together where the data has them."""
    prompts: list[list[int]] = []
    for ids in _comparable(config, tokenizer, 128):
        prompts.append(ids[:256])
        if sum(map(len, prompts)) >= 1000:
            break
    return prompts


def _comparable(config: RunConfig, tokenizer: PreTrainedTokenizerBase, num_rows: int) -> list[list[int]]:
    """The token ids of the run's first held-out rows, or of its first rows where none are held out."""
    held_out = [DataSource(path) for path in choices.eval_datasets(config).values()]
    source = held_out[0] if held_out else choices.data_sources(config)[0]
    if config.streaming and not held_out:
        rows = first_rows(source, num_rows)
    else:
        rows = load_rows(source, "test" if held_out else "train")
        rows = rows.select(range(min(num_rows, len(rows))))
    # No row may fall away here: each is a text to compare on, whatever of it was learned.
    options = replace(choices.data_options(config, packing=False), overlong="truncate", train_on_prompt=True)
    prepared = prepare_mixture([(source, rows, source.path)], tokenizer, options, prepare_part=_preparation(config))
    ids = "chosen_input_ids" if "chosen_input_ids" in prepared.dataset.column_names else "input_ids"
    return [row[ids] for row in prepared.dataset]


def checkpoint_folder(config: RunConfig) -> Path:
    """The folder of the base model's checkpoint; a name on the hub is brought into its cache first."""
    folder = Path(config.model_name_or_path)
    if folder.exists():
        return folder
    try:
        patterns = ["*.json", "*.safetensors"]
        return Path(
            snapshot_download(config.model_name_or_path, revision=config.model_revision, allow_patterns=patterns)
        )
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"no model {config.model_name_or_path!r}: {str(error).splitlines()[0]}",
            allowed="a folder with config.json and safetensors, or a name on the hub",
        ) from error


def original_checkpoint(config: RunConfig) -> Path | None:
    """The folder of the 16-bit checkpoint that is quantized while it loads; None where none of that happens."""
    if not config.quantizes:
        return None
    if Path(config.model_name_or_path).is_file():
        return None
    folder = checkpoint_folder(config)
    entry = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("quantization_config")
    return None if entry else folder


def base_of(config: RunConfig, adapter: Path | None = None) -> str:
    """The base a run's adapter belongs to: the one beside it or in the run's folder, if the run changed it.

    Args:
        config: The run.
        adapter: The folder of the adapter, which may be a checkpoint's; None: the run's own.
    """
    owned = [folder / BASE_FOLDER for folder in (adapter, Path(config.output_dir)) if folder is not None]
    own = next((folder for folder in owned if folder.is_dir()), None)
    return str(own) if own is not None and config.adapter is not None else config.model_name_or_path


def write_base(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Save the base under an adapter, as it is now, and its tokenizer."""
    base = model.get_base_model()
    tied_head = getattr(getattr(base, "hf_quantizer", None), "tied_head", None)
    base.save_pretrained(folder, state_dict=base_state_dict(base, tied_head))
    tokenizer.save_pretrained(folder)


@dataclass(frozen=True)
class FinishedRun:
    """A run on the disk.

    Args:
        config: Its configuration; `output_dir` is where the run is now.
        adapter: The folder of its adapter, or of one of its checkpoints; of a run that trained all weights, the
            model's.
    """

    config: RunConfig
    adapter: Path


def find_run(folder: str | Path) -> FinishedRun:
    """The run at `folder`, which is its own, its adapter's or a checkpoint's.

    Raises:
        CheckpointError: There is none, it has no adapter yet, or its base model is gone.
    """
    path = Path(folder)
    run = next((run for run in (path, path.absolute().parent) if (run / run_folder.CONFIG_FILE).is_file()), None)
    if run is None:
        raise CheckpointError(
            f"no run at {folder}",
            found="an adapter without its run" if (path / "adapter_config.json").is_file() else None,
            allowed=f"a folder with {run_folder.CONFIG_FILE} and {run_folder.ADAPTER_FOLDER}/, as train leaves it",
        )
    config = load_config(run)
    kind, file = ("adapter", "adapter_config.json") if config.adapter else ("model", "config.json")
    adapter = path if run != path else run / run_folder.result_folder(config.adapter)
    if not (adapter / file).is_file():
        checkpoints = list_checkpoints(run)
        raise CheckpointError(
            f"the run at {run} has no {kind} in {adapter}",
            found="a run that did not end" if checkpoints else None,
            hint=f"finish it with `fourfold train {run} --resume_from_checkpoint auto`, or give {checkpoints[-1]}"
            if checkpoints
            else None,
        )
    if config.adapter is None:
        return FinishedRun(config, adapter)
    base = base_of(config, adapter)
    if base.startswith((".", "/", "~")) or base.count("/") > 1:
        _require_base(Path(base), run)
    return FinishedRun(config, adapter)


def _require_base(base: Path, run: Path) -> None:
    if not base.exists():
        raise CheckpointError(
            f"the base model of the run at {run} is gone: {base}",
            found=f"no such folder, looked up from {Path.cwd()}",
            hint=f"bring it back, or set model_name_or_path in {run / run_folder.CONFIG_FILE} to where it is now",
        )
