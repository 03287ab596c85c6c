from __future__ import annotations

from pathlib import Path

import pytest

from fourfold.config import RunConfig, load_config
from fourfold.config.search import SearchConfig, load_search, search_space, with_values
from fourfold.errors import ConfigError
from fourfold.search.space import Choices, Range

SECTION = """
model_name_or_path: MODEL
search:
  space:
    learning_rate: {low: 1e-5, high: 1e-2, log: true}
    lora_r: {low: 4, high: 32, step: 4}
    target_modules: [all-linear, [q_proj, v_proj], null]
  n_trials: 3
"""


def space_of(**entries: object) -> dict[str, Range | Choices]:
    return dict(search_space(SearchConfig(space=entries)).entries)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_the_section_is_no_part_of_the_run_and_gives_the_search(tmp_path) -> None:
    path = write(tmp_path / "run.yaml", SECTION)
    assert load_config(path) == RunConfig(model_name_or_path="MODEL")
    search = load_search(path)
    assert search.n_trials == 3
    assert search_space(search).entries == {
        "learning_rate": Range(1e-5, 1e-2, log=True),
        "lora_r": Range(4, 32, step=4, is_int=True),
        "target_modules": Choices(("all-linear", ["q_proj", "v_proj"], None)),
    }


def test_a_file_stands_in_for_the_section_with_or_without_its_name(tmp_path) -> None:
    path = write(tmp_path / "run.yaml", "model_name_or_path: MODEL\n")
    bare = write(tmp_path / "bare.yaml", "space: {lora_r: [4, 8]}\nn_trials: 5\n")
    named = write(tmp_path / "named.yaml", "search:\n  space: {lora_r: [4, 8]}\n  n_trials: 5\n")
    assert load_search(path, bare) == load_search(path, named) == SearchConfig(space={"lora_r": [4, 8]}, n_trials=5)
    assert load_search(path, bare, n_trials=7, storage=None).n_trials == 7


def test_the_direction_is_told_by_the_name_unless_it_is_given() -> None:
    assert SearchConfig(space={"seed": [1]}, objectives=["eval_loss", "exact_match", "train_seconds"]).directions == {
        "eval_loss": "minimize",
        "exact_match": "maximize",
        "train_seconds": "minimize",
    }
    assert SearchConfig(space={"seed": [1]}, objectives={"x_reward": "minimize"}).directions == {"x_reward": "minimize"}


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"learnin_rate": [1e-3]}, "did you mean learning_rate"),
        ({"output_dir": ["a"]}, "each trial's own"),
        ({"lora_r": [4, "many"]}, "a whole number, at least 1"),
        ({"lora_r": {"low": 0, "high": 8}}, "at least 1"),
        ({"lora_r": {"low": 1.5, "high": 8}}, "a whole number"),
        ({"lora_dropout": {"low": 0, "high": 1}}, "below 1"),
        ({"bnb_4bit_blocksize": {"low": 32, "high": 128}}, "found:   33"),
        ({"bnb_4bit_quant_type": {"low": "fp4", "high": "nf4"}}, "a list of choices"),
        ({"bnb_4bit_quant_type": ["nf4", "nf5"]}, "nf4, fp4"),
        ({"packing": {"low": 0, "high": 1}}, "true or false"),
        ({"learning_rate": {"low": 1e-3, "high": 1e-4}}, "low is above high"),
        ({"learning_rate": {"low": 1e-3, "hgih": 1e-2}}, "{low, high, log, step}"),
        ({"learning_rate": {"low": 1e-3, "high": 1e-2, "log": "yes"}}, "true or false"),
        ({"learning_rate": 1e-3}, "a list of choices"),
        ({"learning_rate": []}, "no choices"),
    ],
)
def test_an_entry_that_its_key_does_not_take_is_refused(entries, said) -> None:
    with pytest.raises(ConfigError) as caught:
        space_of(**entries)
    assert next(iter(entries)) in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "does not say what to search"),
        ("search: 3", "no mapping"),
        ("search: {n_trials: 3}", "space"),
        ("search: {space: {lora_r: [4]}, n_trial: 3}", "did you mean n_trials"),
        ("search: {space: {lora_r: [4]}, n_trials: 0}", "n_trials"),
        ("search: {space: {lora_r: [4]}, sampler: best}", "sampler"),
        ("search: {space: {lora_r: [4]}, objectives: {eval_loss: down}}", "minimize"),
        ("search: {space: {lora_r: [4]}}\nsearch: {}", "given twice"),
    ],
)
def test_a_faulty_section_is_refused_by_name(tmp_path, text, said) -> None:
    path = write(tmp_path / "run.yaml", f"model_name_or_path: MODEL\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        load_search(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)


def test_values_are_put_into_a_run_like_words_of_the_command_line() -> None:
    config = RunConfig(model_name_or_path="MODEL", max_steps=4, load_in_4bit=True)
    other = with_values(config, {"num_train_epochs": 2.0, "load_in_8bit": True}, output_dir="there")
    assert (other.max_steps, other.num_train_epochs) == (None, 2.0)
    assert (other.load_in_4bit, other.load_in_8bit, other.output_dir) == (False, True, "there")
    with pytest.raises(ConfigError, match="warm-up"):
        with_values(RunConfig(model_name_or_path="MODEL", warmup_steps=3), {"lr_scheduler_type": "constant"})
