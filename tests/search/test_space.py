from __future__ import annotations

import optuna
import pytest

from fourfold.search.space import Choices, Range, SearchSpace


def draw(entry: Range | Choices, count: int = 50) -> list[object]:
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    return [entry.suggest(study.ask(), "key") for _ in range(count)]


def test_a_range_gives_numbers_between_its_ends_of_the_keys_own_type() -> None:
    assert all(isinstance(value, int) and 2 <= value <= 9 for value in draw(Range(2, 9, is_int=True)))
    assert all(isinstance(value, float) and 0 <= value <= 1 for value in draw(Range(0, 1)))


def test_a_step_gives_its_multiples_alone() -> None:
    assert set(draw(Range(4, 16, step=4, is_int=True))) == {4, 8, 12, 16}


def test_log_draws_as_many_small_numbers_as_large_ones() -> None:
    small = [value for value in draw(Range(1e-6, 1e-2, log=True), 200) if value < 1e-4]
    assert 70 < len(small) < 130


def test_choices_may_be_any_values_and_come_back_as_they_were() -> None:
    values = ("all-linear", ["q_proj", "v_proj"], None, True, 1, 4)
    choices = Choices(values)
    assert {str(value) for value in draw(choices, 100)} == {str(value) for value in values}
    for value in values:
        assert choices.value(choices.stored(value)) == value
        assert type(choices.value(choices.stored(value))) is type(value)


@pytest.mark.parametrize(
    "faulty",
    [
        {"low": 2, "high": 1},
        {"low": 0, "high": 1, "log": True},
        {"low": 1, "high": 9, "log": True, "step": 2},
        {"low": 1, "high": 9, "step": 0},
        {"low": 1, "high": 9, "step": 0.5, "is_int": True},
    ],
)
def test_a_range_that_cannot_be_is_refused(faulty: dict) -> None:
    with pytest.raises(ValueError, match=r"low|log|step"):
        Range(**faulty)


def test_choices_that_are_none_or_twice_the_same_are_refused() -> None:
    for values in ((), (1, 1), (["a"], ["a"])):
        with pytest.raises(ValueError, match="choice"):
            Choices(values)


def test_what_the_space_does_not_hold_is_not_stored() -> None:
    space = SearchSpace({"a": Range(4, 16, step=4, is_int=True), "b": Choices((1, 2))})
    assert space.stored({"a": 8, "b": 2}) == {"a": 8, "b": 2}
    assert space.stored({"a": 6, "b": 2}) is None
    assert space.stored({"a": 8, "b": 3}) is None
    assert space.stored({"a": 20, "b": 1}) is None
