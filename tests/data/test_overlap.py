from __future__ import annotations

import random

import pytest
from datasets import Dataset

from fourfold.data import overlap, pack
from fourfold.data.overlap import count_rows_in


def documents(count: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3) for _ in range(draw.randint(1, 6))] for _ in range(count)]


@pytest.mark.parametrize("packed", [False, True])
def test_rows_that_stand_in_both_are_counted_as_a_set_of_them_counts(
    monkeypatch: pytest.MonkeyPatch, packed: bool
) -> None:
    monkeypatch.setattr(overlap, "_ROWS_AT_A_TIME", 7)
    held_out, train = documents(60, seed=1), documents(90, seed=2)
    expected = sum(row in train for row in held_out)
    assert 0 < expected < 60
    # Of a part of it, whose tokens do not begin at the first.
    others = Dataset.from_dict({"input_ids": [[9, 9], *train], "labels": [[9, 9], *train]}).select(range(1, 91))
    others = pack(others, 16) if packed else others
    assert count_rows_in(Dataset.from_dict({"input_ids": held_out}), others) == expected


def test_order_and_place_of_tokens_count() -> None:
    train = Dataset.from_dict({"input_ids": [[1, 2, 3], [0, 0], [5, 5, 5]]})
    others = [[3, 2, 1], [0], [0, 0, 0], [5, 5], [2, 2, 2]]
    assert count_rows_in(Dataset.from_dict({"input_ids": others}), train) == 0
    assert count_rows_in(Dataset.from_dict({"input_ids": [*others, [0, 0]]}), train) == 1


def test_pairs_are_the_same_where_both_answers_are() -> None:
    def pairs(*rows: tuple[list[int], list[int]]) -> Dataset:
        chosen, rejected = zip(*rows, strict=True)
        return Dataset.from_dict({"chosen_input_ids": list(chosen), "rejected_input_ids": list(rejected)})

    train = pairs(([1, 2], [1, 3]), ([4], [5]))
    assert count_rows_in(pairs(([1, 2], [1, 3]), ([1, 3], [1, 2]), ([1, 2], [5]), ([4], [5])), train) == 2
