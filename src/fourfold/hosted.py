"""What a server or a chat answers by: a run or a model, and adapters beside it, found and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fourfold.config import RunConfig
from fourfold.config import options as choices
from fourfold.errors import ConfigError
from fourfold.inputs import FinishedRun, base_of, find_run
from fourfold.limiting import limit_of
from fourfold.models.loading import load_model, load_tokenizer
from fourfold.models.preparing import add_adapter, load_adapter
from fourfold.quantization.hf_config import FourfoldConfig
from fourfold.training import run_folder

__all__ = ["Hosted", "Loaded", "find_hosted", "is_alone", "load_models"]


@dataclass(frozen=True)
class Hosted:
    """What is to be served, found and not loaded yet.

    Args:
        base: Folder or name of the base model.
        base_name: The name that requests have for it; None where the base alone is no model: an adapter changed it.
        adapters: Folder of each adapter by the name that requests have for it.
        tokenizer: Where the tokenizer is.
        load_options, stream_options: Of `load_model` and `load_adapter`.
        config: Of the run, if it is one.
    """

    base: str
    base_name: str | None
    adapters: Mapping[str, Path]
    tokenizer: str
    load_options: Mapping[str, Any] = field(default_factory=dict)
    stream_options: Mapping[str, Any] = field(default_factory=dict)
    config: RunConfig | None = None

    def limit(self) -> AbstractContextManager[None]:
        """Keeps to the run's `gpu_memory_limit`."""
        return nullcontext() if self.config is None else limit_of(self.config)


def find_hosted(
    model: str, adapters: Mapping[str, str] | None = None, *, name: str | None = None, load_in_4bit: bool = False
) -> Hosted:
    """What there is to serve.

    Args:
        model: Folder of a run, of a model, or a hub's name.
        adapters: More adapters of the same base: folders of runs or of adapters, by the name they are to have.
        name: What requests call the run or the model, in place of its own name.
        load_in_4bit: Quantize a model; a run says itself whether it does.

    Raises:
        CheckpointError: A run that is not finished, or no adapter where one is named.
        ConfigError: A run whose model does not write; an adapter of another base; two models of one name.
    """
    folder = Path(model)
    if (folder / run_folder.CONFIG_FILE).is_file() or (folder / "adapter_config.json").is_file():
        hosted = _hosted_run(_writing_run(model), name)
        if load_in_4bit:
            raise ConfigError("--load-in-4bit is for a model; a run is loaded as it was trained", found=model)
    else:
        options = {"quantization": FourfoldConfig()} if load_in_4bit else {}
        hosted = Hosted(model, name or _name_of(model), {}, model, options)
    return _with_adapters(hosted, adapters or {})


def _writing_run(folder: str) -> FinishedRun:
    run = find_run(folder)
    if run.config.method == "reward":
        raise ConfigError(f"the run at {folder} trained a model that gives scores, and no model that writes")
    return run


def _hosted_run(run: FinishedRun, name: str | None) -> Hosted:
    config = run.config
    own = name or Path(config.output_dir).absolute().name
    if config.adapter is None:
        options = choices.load_options(config)
        return Hosted(str(run.adapter), own, {}, str(run.adapter), options, config=config)
    base = base_of(config, run.adapter)
    return Hosted(
        base,
        # What PiSSA or LoftQ left of the base answers well with its adapter alone.
        _name_of(base) if base == config.model_name_or_path else None,
        {own: run.adapter},
        str(run.adapter),
        choices.load_options(config, streams=True),
        choices.stream_options(config),
        config,
    )


def _name_of(model: str) -> str:
    """A hub's name as it is, a folder's last part."""
    path = Path(model)
    return path.absolute().name if path.exists() else model


def _with_adapters(hosted: Hosted, adapters: Mapping[str, str]) -> Hosted:
    found = dict(hosted.adapters)
    for name, folder in adapters.items():
        if name in found or name == hosted.base_name:
            raise ConfigError("two models of one name", found=name, hint="name it otherwise: --adapter NAME=FOLDER")
        found[name] = _adapter_folder(hosted, folder)
    if hosted.base_name in hosted.adapters:
        raise ConfigError("two models of one name", found=hosted.base_name, hint="name the run's: --name NAME")
    return Hosted(**{**vars(hosted), "adapters": found})


def _adapter_folder(hosted: Hosted, folder: str) -> Path:
    path = Path(folder)
    if is_alone(path):
        return path  # its shapes are compared where it is loaded
    run = _writing_run(folder)
    if run.config.adapter is None:
        raise ConfigError(f"the run at {folder} trained all weights, and no adapter")
    base = base_of(run.config, run.adapter)
    if base != hosted.base and Path(base).absolute() != Path(hosted.base).absolute():
        raise ConfigError(f"the adapter of {folder} belongs to another base", found=base, allowed=hosted.base)
    return run.adapter


def is_alone(folder: Path) -> bool:
    """Whether it is an adapter without its run, as an export is."""
    runs = (folder, folder.absolute().parent)
    return (folder / "adapter_config.json").is_file() and not any(
        (run / run_folder.CONFIG_FILE).is_file() for run in runs
    )


class Loaded(NamedTuple):
    """What `load_models` gives.

    Attributes:
        models: By the name that requests have for it, the model's own name of the adapter; None for the base.
    """

    model: PreTrainedModel | PeftModel
    tokenizer: PreTrainedTokenizerBase
    models: dict[str, str | None]


def load_models(hosted: Hosted) -> Loaded:
    """Load base and adapters; the first adapter is the active one.

    Raises:
        CheckpointError, AdapterError: What cannot be loaded.
    """
    model: Any = load_model(hosted.base, **hosted.load_options)
    tokenizer = load_tokenizer(hosted.tokenizer)
    inner: dict[str, str | None] = {}
    for index, (name, folder) in enumerate(hosted.adapters.items()):
        if index == 0:
            model = load_adapter(model, folder, **hosted.stream_options)
            inner[name] = "default"
        else:
            assert isinstance(model, PeftModel)
            inner[name] = f"adapter{index}"  # a module's name has no dots, as a folder's may
            add_adapter(model, folder, f"adapter{index}")
    if hosted.base_name is not None:
        inner[hosted.base_name] = None
    return Loaded(model, tokenizer, inner)
