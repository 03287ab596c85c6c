from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM

from fourfold.data import IGNORE_INDEX, Collator, pack
from fourfold.errors import DataError

PAD = 0
# Eager attention takes its softmax in float32 whatever the model's dtype is.
TOLERANCE = {"sdpa": {"rtol": 1e-9, "atol": 1e-11}, "eager": {"rtol": 1e-4, "atol": 1e-6}}


def documents(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 300, (length,), generator=generator).tolist() for length in lengths]


def as_dataset(rows: list[list[int]]) -> datasets.Dataset:
    return datasets.Dataset.from_dict({"input_ids": rows, "labels": rows})


def load(path: Path, attention: str) -> Any:
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64, attn_implementation=attention)
    return model.eval()


def document_slices(row: dict[str, Any]) -> list[slice]:
    ends = torch.tensor(row["seq_lengths"]).cumsum(0).tolist()
    return [slice(end - length, end) for end, length in zip(ends, row["seq_lengths"], strict=True)]


def test_packing_keeps_every_document_whole() -> None:
    rows = documents([5, 12, 3, 9, 16, 1, 7, 7])
    packed = pack(as_dataset(rows), 16)
    found = []
    for row in packed:
        assert len(row["input_ids"]) <= 16
        assert row["labels"] == row["input_ids"]
        found += [row["input_ids"][part] for part in document_slices(row)]
    assert sorted(found) == sorted(rows)


def test_packing_refuses_a_document_that_does_not_fit() -> None:
    with pytest.raises(DataError, match="longer than the row"):
        pack(as_dataset(documents([5, 17])), 16)


def test_packed_batches_restart_positions_and_mask_first_labels_and_padding() -> None:
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9], "seq_lengths": [3, 2]},
        {"input_ids": [4, 3], "labels": [IGNORE_INDEX, 3], "seq_lengths": [2]},
    ]
    batch = Collator(PAD, width=7)(rows)
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0], [4, 3, 0, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 1, 0, 1, 2, 3, 4]]
    assert batch["labels"].tolist() == [
        [-100, 6, 7, -100, 9, -100, -100],
        [-100, 3, -100, -100, -100, -100, -100],
    ]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_unpacked_batches_are_padded_on_the_right_under_a_mask() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [4], "labels": [4]}]
    batch = Collator(PAD)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [4, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [4, -100, -100]]


def test_a_pad_id_inside_a_document_stays_learned() -> None:
    batch = Collator(9)([{"input_ids": [5, 9], "labels": [5, 9]}, {"input_ids": [5], "labels": [5]}])
    assert batch["labels"].tolist() == [[5, 9], [5, -100]]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_of_packed_rows_are_those_of_the_documents_alone(tiny_llama: Path, attention: str) -> None:
    model = load(tiny_llama, attention)
    packed = list(pack(as_dataset(documents([5, 12, 3, 9, 16, 1, 7])), 24))
    assert len(packed) >= 2
    batch = Collator(PAD)(packed)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        for row, row_logits in zip(packed, logits, strict=True):
            for part in document_slices(row):
                alone = model(input_ids=torch.tensor([row["input_ids"][part]])).logits[0]
                torch.testing.assert_close(row_logits[part], alone, **TOLERANCE[attention])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_changed_document_leaves_its_neighbours_bit_for_bit(tiny_llama: Path, attention: str) -> None:
    model = load(tiny_llama, attention)
    row = {"input_ids": documents([20])[0], "labels": documents([20])[0], "seq_lengths": [8, 12]}
    batch = Collator(PAD, width=24)([row, row])
    changed = batch["input_ids"].clone()
    changed[0, :8] = (changed[0, :8] + 1) % 300
    with torch.no_grad():
        before, after = (
            model(input_ids=ids, position_ids=batch["position_ids"], use_cache=False).logits
            for ids in (batch["input_ids"], changed)
        )
    assert torch.equal(before[0, 8:], after[0, 8:])
    assert torch.equal(before[1], after[1])
    assert not torch.equal(before[0, :8], after[0, :8])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_gradients_under_checkpointing_are_those_of_the_documents_alone(
    tiny_llama: Path, attention: str
) -> None:
    rows = documents([5, 12, 3, 9])
    model = load(tiny_llama, attention).train()
    model.gradient_checkpointing_enable()
    batch = Collator(PAD)(list(pack(as_dataset(rows), 20)))
    model(**batch, use_cache=False, num_items_in_batch=1).loss.backward()
    packed = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_disable()
    for row in rows:
        ids = torch.tensor([row])
        model(input_ids=ids, labels=ids, use_cache=False, num_items_in_batch=1).loss.backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(packed[name], weight.grad, **TOLERANCE[attention])
