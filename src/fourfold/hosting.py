"""From what is to be served to a server; and to the command by which vLLM serves it."""

from __future__ import annotations

import logging
import shlex
from collections.abc import Callable
from pathlib import Path

from fourfold.export.to_adapter import vllm_command
from fourfold.exporting import export
from fourfold.hosted import Hosted, is_alone, load_models
from fourfold.inference import Engine, EngineOptions, not_in_engine
from fourfold.models.underlying import underlying
from fourfold.serving import Served, ServerOptions, open_socket, serve

__all__ = ["host", "load_hosted", "vllm_hand_over"]

logger = logging.getLogger(__name__)


def load_hosted(hosted: Hosted, options: EngineOptions) -> Served:
    """Load base and adapters, and put an engine over them.

    Raises:
        CheckpointError, AdapterError, InferenceError: What cannot be loaded, or not be run.
    """
    loaded = load_models(hosted)
    if reason := not_in_engine(underlying(loaded.model).generation_config):
        logger.warning("The model's generation config asks for what is not done here, and goes without: %s", reason)
    return Served(Engine(loaded.model, loaded.tokenizer, options), loaded.models)


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
        if is_alone(folder):
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
