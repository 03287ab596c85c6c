"""What is exported, and what a reader of the export found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from fourfold.errors import VerificationError
from fourfold.export.agreement import Agreement, agreement, require_same_texts
from fourfold.export.verification import reference_logits

__all__ = ["Reading", "Trained", "check_beside", "generation_config", "read_folder"]


@dataclass(frozen=True)
class Trained:
    """A trained model with what belongs to it.

    Args:
        model: Base and adapter, or a model that was trained as a whole, in fp32.
        tokenizer: Its tokenizer, with the chat template.
        prompts: Token ids of held-out texts to compare on.
        stops: Tokens that end a reply.
        dtype: The 16-bit dtype that it is written in.
        name: A name for it.
        base: Name or folder of the base model.
        adapter: Folder of the adapter, if there is one.
    """

    model: PeftModel | PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: list[list[int]]
    stops: list[int]
    dtype: torch.dtype
    name: str
    base: str
    adapter: Path | None


@dataclass(frozen=True)
class Reading:
    """What one reader of an export found.

    Args:
        agreement: Its predictions against the trained model's.
        version: Of the reader.
        checks: What else was compared.
        is_sample: It was asked at so few positions that one near tie would pass the bound of likeliest tokens: their
            share is told, and the KL alone is bounded.
    """

    agreement: Agreement
    version: str
    checks: dict[str, Any] = field(default_factory=dict)
    is_sample: bool = False


def generation_config(stops: list[int], settings: GenerationConfig) -> GenerationConfig:
    """Settings of generation in which all of the trained model's stop tokens end a reply."""
    settings = GenerationConfig.from_dict(settings.to_dict())
    settings.eos_token_id = stops
    return settings


def read_folder(
    trained: Trained, folder: Path, model: PreTrainedModel, reference: Sequence[Tensor], version: str
) -> Reading:
    """Compare a model that Transformers has read, and what lies beside it in the folder.

    Raises:
        VerificationError: Another tokenizer, chat template or stop tokens.
    """
    checks = check_beside(folder, trained.tokenizer, trained.prompts, trained.stops)
    return Reading(agreement(reference, reference_logits(model, trained.prompts)), version, checks)


def check_beside(
    folder: Path, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]], stops: list[int]
) -> dict[str, Any]:
    """Compare what lies beside a model in its folder with what the trained one has.

    Returns:
        What was compared.

    Raises:
        VerificationError: Another tokenizer, chat template or stop tokens.
    """
    found = AutoTokenizer.from_pretrained(folder)
    texts = require_same_texts(tokenizer, prompts, lambda text: list(found(text)["input_ids"]), "Transformers")
    if found.chat_template != tokenizer.chat_template:
        raise VerificationError("the exported chat template is not the model's; nothing was written")
    written = GenerationConfig.from_pretrained(folder).eos_token_id
    if written != stops:
        raise VerificationError(
            "the exported stop tokens are not the model's; nothing was written", found=written, allowed=str(stops)
        )
    return {"tokenizer": texts, "chat_template": "same", "stop_tokens": stops}
