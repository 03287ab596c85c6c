"""Merging an adapter into its base, to an ordinary 16-bit model.

An adapter was trained on top of the dequantized 4-bit weights. Merged onto those it gives the model that was trained;
merged onto the original 16-bit weights it gives another one, usually close, which nobody has evaluated. Both are
offered, and for both the logits are compared with the trained model's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fourfold.export.agreement import Agreement, Bounds
from fourfold.export.record import folder_bytes, write_verification
from fourfold.export.trained import Reading, check_beside, generation_config
from fourfold.export.verification import LogitDifference, compare_logits, reference_logits
from fourfold.files import whole_folder
from fourfold.inference import stop_token_ids
from fourfold.models.loading import load_model
from fourfold.models.underlying import underlying
from fourfold.quantization.hf_quantizer import FourfoldQuantizer

__all__ = ["BOUNDS", "DEFAULT_BOUND", "ONTO", "MergeReport", "merge_adapter", "write_merged"]

# What the adapter may be merged onto, and what that means.
ONTO: dict[str, str] = {
    "dequantized": "the dequantized 4-bit weights: the model that was trained",
    "original": "the original 16-bit weights: not the model that was trained, compare the difference",
}

# Above what rounding the merged weights to bf16 does (0.006 to 0.012), and a fifth of what a scale wrong by a tenth
# does: the table in `write_merged` has the figures.
DEFAULT_BOUND = 0.02
# What that relative error comes to in predictions: a mean KL grows with its square, and 0.012 made 0.0006 nats. Of a
# few hundred positions several can be near ties: of a small random model 2 of 174 were, at a KL of 6e-8.
BOUNDS = Bounds(kl=2e-3, top1=0.95)


@dataclass(frozen=True)
class MergeReport:
    """What was written, and how far its logits are from the trained model's."""

    folder: str
    onto: str
    dtype: str
    bound: float
    bounds: Bounds
    difference: LogitDifference

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def lines(self) -> list[str]:
        difference = self.difference
        kl = f"  (bound {self.bounds.kl:g})" if math.isfinite(self.bounds.kl) else ""
        top1 = f"  (bound {self.bounds.top1:.2%})" if self.bounds.top1 else ""
        return [
            f"merged onto {ONTO[self.onto]}",
            f"  logits against the trained model, {difference.num_tokens} positions of {difference.num_texts} prompts:",
            f"    relative error  {difference.relative_error:.5f}  (bound {self.bound})",
            f"    largest         {difference.max_abs_difference:.4f}",
            f"    mean KL         {difference.mean_kl:.2e} nats{kl}, at most {difference.max_kl:.2e} at a position",
            f"    same top token  {difference.top1_agreement:.2%}{top1}",
            f"written to {self.folder} in {self.dtype}",
        ]


def merge_adapter(model: PeftModel, dtype: torch.dtype) -> PreTrainedModel:
    """Merge the active adapter and turn every quantized weight into an ordinary one; the model is changed in place.

    Each weight is summed in the model's dtype and then rounded to `dtype`: from a model in fp32, rounded once.

    Args:
        model: A base, quantized or not, with its adapter.
        dtype: dtype of the dense weights.
    """
    base = model.get_base_model()
    quantizer = getattr(base, "hf_quantizer", None)
    merged: PreTrainedModel = model.merge_and_unload()
    if isinstance(quantizer, FourfoldQuantizer):
        merged = quantizer.dequantize(merged, dtype=dtype)
    return merged.to(dtype)


def write_merged(
    trained: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[int]],
    out: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    onto: str = "dequantized",
    load_original: Callable[[], PeftModel] | None = None,
    bound: float | None = None,
    bound_kl: float | None = None,
    bound_top1: float | None = None,
) -> MergeReport:
    """Merge, write, read back what was written, compare, and only then let it stand.

    Both models are compared in the dtype of `trained`. In fp32 what is measured is the merge, with the rounding of its
    weights; in 16 bits it drowns in the rounding of the activations. Of two adapters of SmolLM2-135M (60 and 30 steps),
    over 512 tokens, the relative error of the logits:

        =============================================  ==============  ============
        against the trained model                      in fp32         in bf16
        =============================================  ==============  ============
        that model itself, computed in bf16            0.025, 0.102
        merged onto the dequantized weights, in fp16   0.0014, 0.0009
        merged onto the dequantized weights, in bf16   0.006, 0.008    0.029, 0.053
        merged with the adapter's scale 10% too large  -, 0.095
        merged onto the original weights               0.378, 0.380    0.379, 0.387
        =============================================  ==============  ============

    A single layer of 210 left out (0.010) stays within the bound, as near to the trained model as rounding is.

    Args:
        trained: The trained model in fp32: quantized base and adapter. It is used up.
        tokenizer: Goes beside the model, with its chat template.
        prompts: Token ids of real texts to compare on.
        out: Folder of the merged model.
        dtype: What its weights are written in.
        onto: A key of `ONTO`.
        load_original: Gives the original 16-bit base with the adapter on it; needed for "original".
        bound: Largest relative error of the logits that is let stand (default: `DEFAULT_BOUND`).
        bound_kl, bound_top1: Largest mean KL in nats, smallest share of same likeliest tokens (default: `BOUNDS`; none
            where `bound` says what is near enough).

    Raises:
        VerificationError: Past a bound, or another tokenizer, template or stop token; nothing is written.
        SaveError: The disk is full; nothing is written.
    """
    default = BOUNDS if bound is None else Bounds(kl=math.inf, top1=0.0)
    bounds = Bounds(default.kl if bound_kl is None else bound_kl, default.top1 if bound_top1 is None else bound_top1)
    bound = DEFAULT_BOUND if bound is None else bound
    stops = stop_token_ids(underlying(trained), tokenizer)
    compute_dtype, device = trained.get_base_model().dtype, trained.device
    reference = reference_logits(trained, prompts)
    if onto == "original":
        assert load_original is not None
        trained = load_original()
    with whole_folder(out) as partial:
        merged = merge_adapter(trained, dtype)
        merged.generation_config = generation_config(stops, merged.generation_config)
        merged.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        _release(merged)
        written = load_model(partial, dtype=compute_dtype, device=device)
        difference = compare_logits(reference, reference_logits(written, prompts))
        difference.require(
            bound,
            f"the model merged onto the {onto} weights",
            "merge onto the dequantized weights"
            if onto == "original"
            else "train again, or raise the bound if that is near enough; what is written differs by rounding alone",
        )
        agreement = Agreement(
            difference.num_texts,
            difference.num_tokens,
            difference.mean_kl,
            difference.max_kl,
            difference.top1_agreement,
        )
        agreement.require(bounds, f"the model merged onto the {onto} weights")
        checks = check_beside(partial, tokenizer, prompts, stops)
        reading = Reading(agreement, version("fourfold"), {**checks, "relative_error": difference.relative_error})
        kl = bounds.kl if math.isfinite(bounds.kl) else None
        limits = {"kl": kl, "top1": bounds.top1, "relative_error": bound}
        write_verification(partial, "safetensors", None, folder_bytes(partial), limits, {"fourfold": reading})
    return MergeReport(str(out), onto, str(dtype).removeprefix("torch."), bound, bounds, difference)


def _release(model: nn.Module) -> None:
    """Free the weights: two whole models side by side would double the peak."""
    model.to("meta")
