from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
import trl
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoModelForCausalLM

from fourfold.data import IGNORE_INDEX, Collator, model_inputs, pack, packing
from fourfold.data.packing import best_fit
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
    boundaries = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}
    assert set(batch) == {"input_ids", "labels", "position_ids", "supervised_positions"} | boundaries
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 0, 0], [4, 3, 0, 0, 0, 0, 0]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 1], [0, 1, 0, 1, 2, 3, 4]]
    assert batch["labels"].tolist() == [
        [-100, 6, 7, -100, 9, -100, -100],
        [-100, 3, -100, -100, -100, -100, -100],
    ]
    assert all(batch[name].dtype == torch.int64 for name in set(batch) - boundaries)


def test_packed_batches_tell_where_documents_and_padding_start_when_laid_end_to_end() -> None:
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [5, 6, 7, 8, 9], "seq_lengths": [3, 2]},
        {"input_ids": [4, 3, 2, 8, 8, 8, 8], "labels": [4, 3, 2, 8, 8, 8, 8], "seq_lengths": [2, 5]},
    ]
    batch = Collator(PAD, width=7)(rows)
    for side in "qk":
        assert batch[f"cu_seq_lens_{side}"].tolist() == [0, 3, 5, 7, 9, 14]
        assert batch[f"cu_seq_lens_{side}"].dtype == torch.int32
        assert batch[f"max_length_{side}"] == 5
        assert type(batch[f"max_length_{side}"]) is int
    starts = (batch["position_ids"].flatten() == 0).nonzero().squeeze(1).tolist()
    assert batch["cu_seq_lens_q"].tolist()[:-1] == starts


@pytest.mark.parametrize("packed", [False, True])
def test_supervised_positions_are_those_whose_next_token_has_a_label(packed: bool) -> None:
    rows = [
        {"input_ids": [5, 6, 7, 8, 9], "labels": [5, -100, 7, 8, 9], "seq_lengths": [3, 2]},
        {"input_ids": [4, 3], "labels": [-100, 3], "seq_lengths": [2]},
        {"input_ids": [4], "labels": [4], "seq_lengths": [1]},
    ]
    if not packed:
        rows = [{key: value for key, value in row.items() if key != "seq_lengths"} for row in rows]
    batch = Collator(PAD, width=6)(rows)
    wanted = [
        row * 6 + column
        for row, labels in enumerate(batch["labels"].tolist())
        for column in range(5)
        if labels[column + 1] != IGNORE_INDEX
    ]
    assert batch["supervised_positions"].tolist() == wanted
    assert wanted == ([1, 3, 6] if packed else [1, 2, 3, 6])


def model_of(family: str, attention: str) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 300, "pad_token_id": PAD}
    if family == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "vocab_size": 300}
        sizes |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = AutoConfig.for_model(family, **sizes)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).float()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "smollm3", "phi3", "olmo2", "gpt2"]
)
def test_boundaries_change_no_number_of_attention_that_masks(family: str, attention: str) -> None:
    if (family, attention) == ("gemma2", "sdpa"):
        pytest.skip("it caps its attention logits, which sdpa cannot")
    model = get_peft_model(model_of(family, attention), LoraConfig(target_modules="all-linear"))
    model.train()
    batch = Collator(PAD, width=28)(list(pack(as_dataset(documents([5, 12, 3, 9, 16])), 24)))
    plain = {"input_ids": batch["input_ids"], "position_ids": batch["position_ids"], "use_cache": False}
    inputs = model_inputs(model, batch)
    assert "labels" not in inputs
    assert "supervised_positions" not in inputs
    assert torch.equal(model(**inputs, use_cache=False).logits, model(**plain).logits)


def test_boundaries_stay_out_of_a_forward_that_has_no_name_for_them() -> None:
    class Strict(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
            return input_ids

    batch = Collator(PAD)(list(pack(as_dataset(documents([5, 7])), 16)))
    assert set(model_inputs(Strict(), batch)) == {"input_ids", "position_ids"}


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_keep_their_numbers_through_loader_and_accelerate(workers: int) -> None:
    rows = list(pack(as_dataset(documents([5, 12, 3, 9, 16, 4])), 24))
    loader = DataLoader(rows, batch_size=2, collate_fn=Collator(PAD, width=24), num_workers=workers)
    for got, rows_of_batch in zip(Accelerator(cpu=True).prepare(loader), (rows[:2], rows[2:]), strict=False):
        want = Collator(PAD, width=24)(rows_of_batch)
        assert got.keys() == want.keys()
        for name, value in want.items():
            assert type(got[name]) is type(value)
            assert torch.equal(torch.as_tensor(got[name]), torch.as_tensor(value))


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
    inputs = model_inputs(model, batch) | {"labels": batch["labels"]}
    model(**inputs, use_cache=False, num_items_in_batch=1).loss.backward()
    packed = {name: weight.grad.clone() for name, weight in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_disable()
    for row in rows:
        ids = torch.tensor([row])
        model(input_ids=ids, labels=ids, use_cache=False, num_items_in_batch=1).loss.backward()
    for name, weight in model.named_parameters():
        torch.testing.assert_close(packed[name], weight.grad, **TOLERANCE[attention])


def test_rows_are_padded_to_a_multiple_where_one_is_wanted() -> None:
    rows = [{"input_ids": [5] * length, "labels": [5] * length} for length in (3, 65)]
    batch = Collator(pad_token_id=0, multiple_of=64)(rows)
    assert batch["input_ids"].shape == (2, 128)
    assert batch["attention_mask"].sum(dim=1).tolist() == [3, 65]
    assert batch["labels"][1, 65:].eq(-100).all()
    assert Collator(pad_token_id=0)(rows)["input_ids"].shape == (2, 65)


def best_fit_one_by_one(lengths: list[int], capacity: int) -> list[int]:
    """Space that is left in each row, by the textbook."""
    rows: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [row for row, space in enumerate(rows) if space >= length]
        if not fitting:
            rows.append(capacity)
            fitting = [len(rows) - 1]
        rows[min(fitting, key=lambda row: rows[row])] -= length
    return rows


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("most", "count"), [(30, 400), (64, 150), (3, 90), (64, 1)])
def test_documents_lie_as_best_fit_decreasing_one_by_one_lays_them(seed: int, most: int, count: int) -> None:
    lengths = np.random.default_rng(seed).integers(1, most + 1, count)
    documents, num_documents = best_fit(lengths, 64)
    assert sorted(documents) == list(range(count))
    ends = num_documents.cumsum()
    spaces = [
        64 - lengths[documents[end - number : end]].sum() for end, number in zip(ends, num_documents, strict=True)
    ]
    assert sorted(spaces) == sorted(best_fit_one_by_one(lengths.tolist(), 64))


def test_packing_wastes_no_more_than_trl_does() -> None:
    rows = as_dataset(documents([3 + (number * 37) % 90 for number in range(600)]))
    assert len(pack(rows, 128)) <= len(trl.pack_dataset(rows, 128, strategy="bfd"))


def test_documents_without_a_token_are_left_out_of_packed_rows() -> None:
    assert [row["seq_lengths"] for row in pack(as_dataset([[], [5, 6], []]), 8)] == [[2]]


def test_rows_are_packed_window_by_window(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "WINDOW_TOKENS", 64)
    monkeypatch.setattr(packing, "WINDOW_ROWS", 1)
    rows = documents([1 + number % 16 for number in range(40)])
    # Of a part of a data set, whose tokens do not begin at the first.
    packed = pack(as_dataset([[1], *rows]).select(range(1, 41)), 16)
    found = [(row["input_ids"][part], row["labels"][part]) for row in packed for part in document_slices(row)]
    assert sorted(found) == sorted((row, row) for row in rows)
