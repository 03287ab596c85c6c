"""A tiny model, tokenizer and rows, so that a training run takes a second."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fourfold.training.building import build_trainer
from fourfold.training.distributed import processes
from fourfold.training.options import TrainingOptions
from fourfold.training.trainer import FourfoldTrainer

VOCAB = 96


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<eos>", *(f"w{index}" for index in range(VOCAB - 2))]
    core = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    made.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    return made


def base_model(dtype: torch.dtype = torch.float32, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        pad_token_id=0,
        eos_token_id=1,
        # Logits far from uniform, so that losses differ between tokens.
        initializer_range=0.15,
    )
    return LlamaForCausalLM(config).to(dtype)


def peft_model(dtype: torch.dtype = torch.float32, dropout: float = 0.0, r: int = 4, **lora: Any) -> PeftModel:
    torch.manual_seed(1)
    config = LoraConfig(r=r, lora_alpha=8, lora_dropout=dropout, target_modules="all-linear", **lora)
    # bf16 adapters of a bf16 base are made fp32 by PEFT, as for a quantized base; fp64 ones stay fp64.
    model = get_peft_model(base_model(dtype), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # not zero, so that the gradients of lora_A are not zero either
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def rows(count: int = 16, seed: int = 3) -> Dataset:
    """Rows of 6 to 24 tokens of which 1 to 12 at the end are supervised."""
    draw = random.Random(seed)
    made = []
    for _ in range(count):
        answer, prompt = draw.randint(1, 12), draw.randint(5, 12)
        ids = [draw.randrange(2, VOCAB) for _ in range(prompt + answer)]
        made.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    return Dataset.from_list(made)


def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    width = max(len(row["input_ids"]) for row in batch)

    def pad(key: str, value: int) -> torch.Tensor:
        return torch.tensor([row[key] + [value] * (width - len(row[key])) for row in batch])

    mask = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in batch]
    return {
        "input_ids": pad("input_ids", 0),
        "labels": pad("labels", -100),
        "attention_mask": torch.tensor(mask),
    }


def trainer(
    output_dir: Path,
    model: PeftModel | None = None,
    *,
    dataset: Dataset | None = None,
    eval_dataset: Dataset | None = None,
    callbacks: tuple[Any, ...] = (),
    **options: Any,
) -> FourfoldTrainer:
    chosen: dict[str, Any] = {
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "compute_dtype": "float32",
        "save_strategy": "no",
        "use_cpu": True,
    } | options
    return build_trainer(
        peft_model() if model is None else model,
        tokenizer(),
        rows() if dataset is None else dataset,
        eval_dataset,
        collate,
        TrainingOptions(output_dir=output_dir, **chosen),
        callbacks,
    )


def adapter_weights(model: PeftModel) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def weighed_factors(trainer: Any) -> dict[str, list[float]]:
    """Of the tensors of each kind, the factors by which it changes when the adapter is multiplied by 0.5. All processes
    call this; it is told to the main one."""

    def whole() -> dict[str, torch.Tensor]:
        own = {path: value for path, value in trainer.model.named_parameters() if value.requires_grad}
        return {path: value.detach().clone() for path, value in (trainer.whole_weights() or own).items()}

    before = whole()
    trainer.weigh_adapter(0.5)
    after = whole()
    if not processes().is_main:
        return {}
    found: dict[str, set[float]] = {}
    for path, value in after.items():
        kind = "B" if "lora_B" in path else "A"
        found.setdefault(kind, set()).update((value / before[path]).unique().tolist())
    return {kind: sorted(factors) for kind, factors in found.items()}
