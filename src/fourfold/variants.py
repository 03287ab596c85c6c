"""The models of a comparison, by the words that name them: a run's base and what was trained on it, or any other."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, get_args

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from fourfold.config import RunConfig
from fourfold.config import options as choices
from fourfold.errors import CheckpointError, ConfigError
from fourfold.export.merging import merge_adapter
from fourfold.inputs import base_of, find_run
from fourfold.models.checkpoint_files import check_checkpoint
from fourfold.models.loading import load_model, read_config
from fourfold.models.preparing import load_adapter
from fourfold.training import run_folder

__all__ = ["OF_RUNS", "Variant", "find_variants", "run_among"]

Model: TypeAlias = PreTrainedModel | PeftModel
_ADAPTER_FILE = "adapter_config.json"
_FORMATS: tuple[str, ...] = get_args(RunConfig.model_fields["bnb_4bit_quant_type"].annotation)
_INT8 = "llm_int8"
# What is the comparison's, and not each run's own.
_HOW = ("device", "bnb_4bit_compute_dtype", "attn_implementation", "stream_base", "fused_blocks")


@dataclass(frozen=True)
class Variant:
    """A model to measure.

    Args:
        name: As it was asked for.
        what: What that is, in words.
        tokenizer: Folder or name of its tokenizer.
        load: Loads it.
    """

    name: str
    what: str
    tokenizer: str
    load: Callable[[], Model]


@dataclass(frozen=True)
class _Run:
    """A run, which may not have been trained yet.

    Args:
        config: Its configuration.
        result: The folder of its adapter, or of its model.
    """

    config: RunConfig
    result: Path

    @property
    def has_result(self) -> bool:
        return (self.result / (_ADAPTER_FILE if self.config.adapter else "config.json")).is_file()


def run_among(names: Sequence[str]) -> str | None:
    """The folder of the first run among the words, if there is one."""
    for name in names:
        folder = Path(_parts(name)[0])
        if _is_run(folder):
            return find_run(folder).config.output_dir
    return None


def find_variants(names: Sequence[str], config: RunConfig) -> list[Variant]:
    """What the words name, all of it looked up before anything is loaded.

    Args:
        names: Each a key of `OF_RUNS`, of the configuration's run; a folder of a run, or RUN@ and such a key; a folder
            of an adapter or a model, a hub's name, or MODEL@ and a number format to quantize it in.
        config: Of the run; and how other models are loaded.

    Raises:
        ConfigError: No two words, one twice, or one that names nothing.
        CheckpointError: A run, an adapter or a model that is not there, or not whole.
    """
    if len(names) < 2:
        raise ConfigError("a comparison takes two models or more", found=", ".join(names) or "none", allowed=_allowed())
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ConfigError("a comparison names a model twice", found=", ".join(twice))
    _require_writing(config)
    return [_find(name, config) for name in names]


def _require_writing(config: RunConfig) -> None:
    if config.method == "reward":
        raise ConfigError(
            f"the run at {config.output_dir} trained a model that gives scores",
            allowed="runs that trained models that write",
        )


def _is_run(path: Path) -> bool:
    """Whether it is the folder of a run, or in one that of its adapter, model or checkpoint."""
    if (path / run_folder.CONFIG_FILE).is_file():
        return True
    is_part = path.name in run_folder.RESULTS or path.name.startswith("checkpoint-")
    is_part = is_part or (path / _ADAPTER_FILE).is_file()
    return is_part and (path.absolute().parent / run_folder.CONFIG_FILE).is_file()


def _allowed() -> list[str]:
    return [*OF_RUNS, "RUN, RUN@merged", "MODEL", *(f"MODEL@{name}" for name in (*_FORMATS, _INT8)), "ADAPTER"]


def _parts(name: str) -> tuple[str, str | None]:
    """What stands before the last @, and behind it; a folder with one in its name is a folder."""
    if Path(name).exists() or "@" not in name:
        return name, None
    source, _, kind = name.rpartition("@")
    return source, kind


def _find(name: str, config: RunConfig) -> Variant:
    source, kind = _parts(name)
    if kind is None and name in OF_RUNS:
        result = Path(config.output_dir) / run_folder.result_folder(config.adapter)
        return OF_RUNS[name](name, _Run(config, result))
    path = Path(source)
    if _is_run(path):
        found = find_run(path)
        of_run = kind or ("adapter" if found.config.adapter else "model")
        if of_run not in OF_RUNS:
            raise ConfigError(f"{name}: a run has no such model", found=of_run, allowed=OF_RUNS)
        _require_writing(found.config)
        # Its own model, computed as all others of the comparison are.
        alike = found.config.model_copy(update={key: getattr(config, key) for key in _HOW})
        return OF_RUNS[of_run](name, _Run(alike, found.adapter))
    if (path / _ADAPTER_FILE).is_file():
        if kind is not None:
            raise ConfigError(f"{name}: an adapter is measured as it is", found=f"@{kind}", hint=f"name it {source}")
        return _adapter_alone(name, path, config)
    if path.is_dir() and not (path / "config.json").is_file():
        raise CheckpointError(
            f"{name} names no model",
            found=", ".join(sorted(file.name for file in path.iterdir())) or "an empty folder",
            allowed="the folder of a run, an adapter or a model",
        )
    if not path.exists() and kind is None and "/" not in name and not name.endswith(".gguf"):
        raise ConfigError(f"{name} names no model of a comparison", found=f"no folder {name}", allowed=_allowed())
    return _model(name, source, kind, config)


# ---- Models of a run ----


def _with_bits(config: RunConfig, bits: int) -> RunConfig:
    keys = {"load_in_4bit": bits == 4, "load_in_8bit": bits == 8}
    changed: RunConfig = config.model_copy(update=keys)
    return changed


def _said(config: RunConfig) -> str:
    """How a base is held."""
    if config.load_in_8bit:
        return "LLM.int8()"
    return config.bnb_4bit_quant_type if config.load_in_4bit else "16 bits"


def _base(bits: int | None) -> Callable[[str, _Run], Variant]:
    def make(name: str, run: _Run) -> Variant:
        config = run.config if bits is None else _with_bits(run.config, bits)
        base = config.model_name_or_path
        stored = _stored_quantization(base, config)
        if stored is not None and bits is not None:
            raise ConfigError(
                f"{name}: the base of this run is stored quantized ({stored}), and is what it is",
                found=base,
                allowed="base",
                hint="name the folder of the original model instead"
                + ("" if bits == 16 else f", with @{config.bnb_4bit_quant_type if bits == 4 else _INT8}"),
            )
        what = f"{base}, {stored or _said(config)}"
        return Variant(name, what, base, lambda: load_model(base, **choices.load_options(config)))

    return make


def _adapter(name: str, run: _Run) -> Variant:
    _require_result(name, run, adapter=True)
    config, base = run.config, base_of(run.config, run.result)

    def load() -> Model:
        model = load_model(base, **choices.load_options(config, streams=True))
        adapted: Model = load_adapter(model, run.result, **choices.stream_options(config))
        return adapted

    held = _stored_quantization(base, config) or _said(config)
    return Variant(name, f"{run.result} on {base}, {held}", str(run.result), load)


def _merged(name: str, run: _Run) -> Variant:
    _require_result(name, run, adapter=True)
    config, base = run.config, base_of(run.config, run.result)

    def load() -> Model:
        # As `fourfold merge` writes it: summed in fp32, rounded once.
        options = choices.load_options(config) | {"dtype": torch.float32}
        dtype = choices.merged_dtype(config)
        merged = merge_adapter(load_adapter(load_model(base, **options), run.result, fused=False), dtype)
        computing: Model = merged.to(choices.compute_dtype(config))
        return computing

    return Variant(name, f"{run.result} merged onto the dequantized weights of {base}", str(run.result), load)


def _whole(name: str, run: _Run) -> Variant:
    _require_result(name, run, adapter=False)
    options = choices.load_options(run.config)
    return Variant(name, str(run.result), str(run.result), lambda: load_model(run.result, **options))


def _require_result(name: str, run: _Run, *, adapter: bool) -> None:
    if adapter != (run.config.adapter is not None):
        raise ConfigError(
            f"{name}: the run at {run.config.output_dir} trained {'all weights' if adapter else 'an adapter'}",
            allowed=[key for key in OF_RUNS if key not in (("adapter", "merged") if adapter else ("model",))],
        )
    if not run.has_result:
        raise CheckpointError(
            f"{name}: there is no {'adapter' if adapter else 'model'} in {run.result}",
            hint="train the run first, or leave this model out",
        )


OF_RUNS: dict[str, Callable[[str, _Run], Variant]] = {
    "base": _base(None),
    "base16": _base(16),
    "base8": _base(8),
    "base4": _base(4),
    "adapter": _adapter,
    "merged": _merged,
    "model": _whole,
}
"""The models that belong to a run: its base as the run loads it, in 16, 8 or 4 bits; its adapter on its base, and
merged into it; the model of a run that trained all weights."""


# ---- Models by themselves ----


def _adapter_alone(name: str, folder: Path, config: RunConfig) -> Variant:
    """An adapter without its run, on the base that it names, or on the configuration's where that is not here."""
    try:
        named = json.loads((folder / _ADAPTER_FILE).read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / _ADAPTER_FILE} cannot be read: {error}") from error
    base = named if isinstance(named, str) and Path(named).exists() else config.model_name_or_path
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    run = _Run(config.model_copy(update={"model_name_or_path": base, "adapter": "lora"}), folder)
    found = _adapter(name, replace(run, config=run.config.model_copy(update={"output_dir": str(folder)})))
    return replace(found, tokenizer=str(folder) if has_tokenizer else base)


def _model(name: str, source: str, kind: str | None, config: RunConfig) -> Variant:
    """A model, as it is stored, or quantized while it loads."""
    if kind not in (None, *_FORMATS, _INT8):
        raise ConfigError(f"{name}: unknown number format", found=kind, allowed=(*_FORMATS, _INT8))
    bits = 16 if kind is None else 8 if kind == _INT8 else 4
    keys: dict[str, Any] = {"model_name_or_path": source, "model_revision": None}
    if kind in _FORMATS:
        keys["bnb_4bit_quant_type"] = kind
    if source == config.model_name_or_path:
        del keys["model_revision"]
    own = _with_bits(config.model_copy(update=keys), bits)
    if Path(source).is_dir():
        check_checkpoint(Path(source))
    stored = _stored_quantization(source, own)
    if stored is not None and kind is not None:
        raise ConfigError(f"{name}: {source} is stored quantized already", found=stored, hint=f"name it {source}")
    options = choices.load_options(own)
    return Variant(name, f"{source}, {stored or _said(own)}", source, lambda: load_model(source, **options))


def _stored_quantization(source: str, config: RunConfig) -> str | None:
    """The method that a checkpoint is stored quantized by; None: its weights are 16 bits or more."""
    if source.endswith(".gguf"):
        return None
    entry = getattr(read_config(source, config.model_revision), "quantization_config", None)
    if entry is None:
        return None
    entry = entry if isinstance(entry, dict) else entry.to_dict()
    return str(entry.get("bnb_4bit_quant_type") or entry.get("quant_method"))
