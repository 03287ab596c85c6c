"""From a finished run to what its consumers load."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from fourfold.config import options as choices
from fourfold.errors import ConfigError
from fourfold.export.targets import ExportReport, check_target, export_model
from fourfold.export.trained import Trained
from fourfold.inference import stop_token_ids
from fourfold.inputs import FinishedRun, base_of, export_prompts, find_run, require_free
from fourfold.limiting import limit_of
from fourfold.models.loading import load_model, load_tokenizer
from fourfold.models.preparing import load_adapter
from fourfold.models.underlying import underlying

__all__ = ["export", "load_trained"]


def export(
    run: str,
    out: Path,
    target: str,
    quantization: str | None = None,
    *,
    bound_kl: float | None = None,
    bound_top1: float | None = None,
) -> ExportReport:
    """Write a run's model for its consumers, if it predicts what the trained model does.

    Args:
        run: Folder of a run, or of its adapter.
        out: Folder to write; must not exist, or be empty.
        target: A key of `EXPORTS`.
        quantization: One of the target's.
        bound_kl, bound_top1: Largest mean KL in nats, smallest share of same likeliest tokens; by default the
            quantization's.

    Raises:
        CheckpointError: No finished run at `run`, or `out` is not free.
        ConfigError: What there is not to export to, or what a target cannot hold.
        VerificationError: Past a bound; nothing is written.
        SaveError: The disk is full; nothing is written.
    """
    check_target(target, quantization)
    require_free(out)
    found = find_run(run)
    with limit_of(found.config):
        return export_model(load_trained(found), out, target, quantization, bound_kl, bound_top1)


def load_trained(run: FinishedRun) -> Trained:
    """The model of a finished run in fp32, with all that an export is made of.

    Raises:
        ConfigError: The run trained a model that gives scores.
    """
    config, folder = run.config, run.adapter
    if config.method == "reward":
        raise ConfigError(f"the run at {config.output_dir} trained a model that gives scores, and none that writes")
    # Summed, and compared, in fp32: only the weights that are written are rounded.
    options = choices.load_options(config) | {"dtype": torch.float32}
    tokenizer = load_tokenizer(folder)
    base = str(folder) if config.adapter is None else base_of(config, folder)
    model: PeftModel | PreTrainedModel = load_model(base, **options)
    if config.adapter is not None:
        model = load_adapter(model, folder, fused=False)
    return Trained(
        model=model,
        tokenizer=tokenizer,
        prompts=export_prompts(config, tokenizer),
        stops=stop_token_ids(underlying(model), tokenizer),
        dtype=choices.merged_dtype(config),
        name=Path(config.output_dir).name,
        base=base,
        adapter=None if config.adapter is None else folder,
    )
