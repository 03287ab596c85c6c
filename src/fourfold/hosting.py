"""From a run or a model, and adapters beside it, to what a server serves; and the command by which vLLM serves it."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import PeftModel

from fourfold.config import RunConfig
from fourfold.config import options as choices
from fourfold.errors import ConfigError
from fourfold.export.to_adapter import vllm_command
from fourfold.exporting import export
from fourfold.inference import Engine, EngineOptions, not_in_engine
from fourfold.inputs import FinishedRun, base_of, find_run
from fourfold.limiting import limit_of
from fourfold.models.loading import load_model, load_tokenizer
from fourfold.models.preparing import add_adapter, load_adapter
from fourfold.models.underlying import underlying
from fourfold.quantization.hf_config import FourfoldConfig
from fourfold.serving import Served, ServerOptions, open_socket, serve
from fourfold.training import run_folder

__all__ = ["Hosted", "find_hosted", "host", "load_hosted", "vllm_hand_over"]

logger = logging.getLogger(__name__)


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
    if _is_alone(path):
        return path  # its shapes are compared where it is loaded
    run = _writing_run(folder)
    if run.config.adapter is None:
        raise ConfigError(f"the run at {folder} trained all weights, and no adapter")
    base = base_of(run.config, run.adapter)
    if base != hosted.base and Path(base).absolute() != Path(hosted.base).absolute():
        raise ConfigError(f"the adapter of {folder} belongs to another base", found=base, allowed=hosted.base)
    return run.adapter


def _is_alone(folder: Path) -> bool:
    """Whether it is an adapter without its run, as an export is."""
    runs = (folder, folder.absolute().parent)
    return (folder / "adapter_config.json").is_file() and not any(
        (run / run_folder.CONFIG_FILE).is_file() for run in runs
    )


def load_hosted(hosted: Hosted, options: EngineOptions) -> Served:
    """Load base and adapters, and put an engine over them.

    Raises:
        CheckpointError, AdapterError, InferenceError: What cannot be loaded, or not be run.
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
    if reason := not_in_engine(underlying(model).generation_config):
        logger.warning("The model's generation config asks for what is not done here, and goes without: %s", reason)
    return Served(Engine(model, tokenizer, options), inner)


def host(
    hosted: Hosted,
    engine_options: EngineOptions,
    options: ServerOptions,
    on_listening: Callable[[Served, int], None],
) -> None:
    """Serve until the process is told to end.

    Args:
        on_listening: Called with what is served and the port, when requests are answered.

    Raises:
        ConfigError: The address is taken.
        CheckpointError, AdapterError, InferenceError: As `load_hosted`.
    """
    with open_socket(options) as listener, hosted.limit():
        port = listener.getsockname()[1]
        served = load_hosted(hosted, engine_options)
        serve(served, options, listener, lambda: on_listening(served, port))


def vllm_hand_over(hosted: Hosted, out: Path, engine_options: EngineOptions, options: ServerOptions) -> str:
    """Export what vLLM takes, each adapter into a folder of its own, and give the command that serves it.

    Args:
        out: Folder for the exports; not needed, and not written, for a model without adapters.

    Raises:
        CheckpointError: `out` is not free.
        ConfigError: An adapter that vLLM does not take; `fourfold export --format safetensors` merges it.
        VerificationError: An export is not what was trained.
    """
    folders: dict[str, Path] = {}
    for name, folder in hosted.adapters.items():
        if _is_alone(folder):
            folders[name] = folder
        else:
            export(str(folder), out / name, "adapter")
            folders[name] = out / name
    limits = {"--max-model-len": engine_options.max_length, "--max-num-seqs": engine_options.max_sequences}
    words = [word for option, value in limits.items() if value is not None for word in (option, str(value))]
    if hosted.base_name not in (None, hosted.base):
        words += ["--served-model-name", str(hosted.base_name)]
    words += ["--host", options.host, "--port", str(options.port)]
    return f"{vllm_command(hosted.base, folders)} {shlex.join(words)}"
