"""What a trained model is exported to, each target a row; and the way they share: write, read back, compare."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from fourfold.errors import ConfigError
from fourfold.export import to_adapter, to_bnb_4bit, to_gguf, to_safetensors
from fourfold.export.agreement import Agreement, Bounds
from fourfold.export.record import folder_bytes, write_verification
from fourfold.export.trained import Reading, Trained
from fourfold.export.verification import reference_logits
from fourfold.files import whole_folder

__all__ = ["EXPORTS", "Export", "ExportReport", "check_target", "export_model"]


class _Write(Protocol):
    def __call__(self, trained: Trained, folder: Path, quantization: str | None) -> list[str]: ...


class _Read(Protocol):
    def __call__(self, trained: Trained, folder: Path, reference: Sequence[torch.Tensor]) -> dict[str, Reading]: ...


@dataclass(frozen=True)
class Export:
    """A target.

    Args:
        description: What it is.
        write: Writes it into a folder, and says what to do with it.
        read: Loads it by its consumers' own loaders, and compares tokenizer, template, stop tokens and logits.
        quantizations: The names that `--quantization` may have, the first by default, each with its bounds; one named
            "" stands for none.
    """

    description: str
    write: _Write
    read: _Read
    quantizations: dict[str, Bounds]


EXPORTS: dict[str, Export] = {
    "safetensors": Export(
        "merged, 16 bits, in shards", to_safetensors.write, to_safetensors.read, to_safetensors.BOUNDS
    ),
    "bnb-4bit": Export(
        "merged, 4 bits as bitsandbytes has them", to_bnb_4bit.write, to_bnb_4bit.read, to_bnb_4bit.BOUNDS
    ),
    "gguf": Export("merged, for llama.cpp and Ollama", to_gguf.write, to_gguf.read, to_gguf.BOUNDS),
    "adapter": Export("the adapter alone, for vLLM and SGLang", to_adapter.write, to_adapter.read, to_adapter.BOUNDS),
}


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how its readers find it."""

    folder: str
    format: str
    quantization: str | None
    num_bytes: int
    bounds: Bounds
    readings: dict[str, Reading]
    next_steps: list[str]

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        title = f"{self.format} {self.quantization or ''}".strip()
        lines = [f"exported as {title}: {EXPORTS[self.format].description}"]
        for reader, reading in self.readings.items():
            found: Agreement = reading.agreement
            lines += [
                f"  read by {reader}, {found.num_tokens} positions of {found.num_texts} texts:",
                f"    mean KL         {found.mean_kl:.2e} nats  (bound {self.bounds.kl:g}), "
                f"at most {found.max_kl:.2e} at a position",
                f"    same top token  {found.top1_agreement:.2%}"
                + ("" if reading.is_sample else f"  (bound {self.bounds.top1:.2%})"),
            ]
        lines.append(f"written to {self.folder}: {self.num_bytes / 2**20:,.1f} MiB")
        return [*lines, *self.next_steps]


def export_model(
    trained: Trained,
    out: Path,
    target: str,
    quantization: str | None = None,
    bound_kl: float | None = None,
    bound_top1: float | None = None,
) -> ExportReport:
    """Write a trained model for its consumers, read it back as they do, compare, and only then let it stand.

    Args:
        trained: The model as it was trained, in fp32, with what belongs to it.
        out: Folder to write.
        target: A key of `EXPORTS`.
        quantization: One of the target's (default: its first).
        bound_kl, bound_top1: In place of the quantization's bounds.

    Raises:
        ConfigError: A target or a quantization that there is not, or a model that the target cannot hold.
        VerificationError: Past a bound, or another tokenizer, template or stop token; nothing is written.
        SaveError: The disk is full; nothing is written.
    """
    export = EXPORTS[target]
    named = check_target(target, quantization)
    default = export.quantizations[named]
    bounds = Bounds(default.kl if bound_kl is None else bound_kl, default.top1 if bound_top1 is None else bound_top1)
    quantization = named or None
    reference = reference_logits(trained.model, trained.prompts)
    with whole_folder(out) as partial:
        next_steps = export.write(trained, partial, quantization)
        readings = export.read(trained, partial, reference)
        for reader, reading in readings.items():
            its_bounds = replace(bounds, top1=0.0) if reading.is_sample else bounds
            reading.agreement.require(its_bounds, f"the export to {target} {quantization or ''}, read by {reader},")
        num_bytes = folder_bytes(partial)
        report = ExportReport(str(out), target, quantization, num_bytes, bounds, readings, next_steps)
        write_verification(partial, target, quantization, num_bytes, asdict(bounds), readings)
    return replace(report, next_steps=[step.replace(str(partial), str(out)) for step in next_steps])


def check_target(target: str, quantization: str | None) -> str:
    """The quantization that is meant. Raises ConfigError for a target or a quantization that there is not."""
    if target not in EXPORTS:
        raise ConfigError("unknown format to export to", found=target, allowed=EXPORTS)
    known = EXPORTS[target].quantizations
    quantization = quantization or next(iter(known))
    if quantization not in known:
        raise ConfigError(
            f"{target} has no such quantization",
            found=quantization,
            allowed=[name for name in known if name] or "none: leave --quantization out",
        )
    return quantization
