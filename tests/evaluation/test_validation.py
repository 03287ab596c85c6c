from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from fourfold.data import Collator, pack
from fourfold.errors import DataError
from fourfold.evaluation import validation_loss

PAD = 0


def rows() -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(2)
    result = []
    for length, masked in [(5, 2), (12, 11), (3, 0), (9, 4), (16, 1), (7, 7)]:
        ids = torch.randint(3, 300, (length,), generator=generator).tolist()
        result.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return result


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float64)


def plain_losses(model: Any) -> list[float]:
    """Of each supervised token, row by row, in float64, without the library's loss."""
    losses = []
    for row in rows():
        with torch.no_grad():
            logits = model.eval()(torch.tensor([row["input_ids"]])).logits[0]
        logs = logits - logits.exp().sum(-1, keepdim=True).log()
        losses += [-float(logs[position, label]) for position, label in enumerate(row["labels"][1:]) if label != -100]
    return losses


@pytest.mark.parametrize("batch_size", [1, 2, 4, 10])
def test_the_loss_is_the_token_mean_whatever_the_batch_size(model: Any, batch_size: int) -> None:
    expected = plain_losses(model)
    model.train()
    result = validation_loss(model, rows(), Collator(PAD), batch_size)
    assert result.num_tokens == len(expected)
    assert result.loss == pytest.approx(math.fsum(expected) / len(expected), rel=1e-12)
    assert model.training


def test_packed_rows_have_the_loss_of_the_unpacked(model: Any) -> None:
    expected = plain_losses(model)
    packed = pack(datasets.Dataset.from_list(rows()), 24)
    assert len(packed) < len(rows())
    result = validation_loss(model, packed, Collator(PAD), 2)
    assert result.num_tokens == len(expected)
    assert result.loss == pytest.approx(math.fsum(expected) / len(expected), rel=1e-12)


def test_an_adapters_loss_is_taken_too(model: Any) -> None:
    expected = plain_losses(model)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    result = validation_loss(adapted, rows(), Collator(PAD), 3)
    assert result.loss == pytest.approx(math.fsum(expected) / len(expected), rel=1e-12)


def test_logits_are_computed_for_supervised_positions_alone(model: Any) -> None:
    shapes = []
    handle = model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape[:2])))
    validation_loss(model, rows()[1:2], Collator(PAD), 1)
    handle.remove()
    assert shapes == [(1, 1)]


def test_rows_without_a_supervised_token_are_refused(model: Any) -> None:
    with pytest.raises(DataError, match="no supervised token"):
        validation_loss(model, rows()[-1:], Collator(PAD), 1)
