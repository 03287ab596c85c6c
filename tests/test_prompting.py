"""Samples in whole runs: what is asked, and how it is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fourfold import pipeline
from fourfold.errors import DataError
from fourfold.inputs import read_held_out, read_tokenizer
from fourfold.prompting import prompts_of

pytestmark = pytest.mark.usefixtures("one_quiet_thread")
USER = {"role": "user", "content": "Hello"}
ASSISTANT = {"role": "assistant", "content": "Good day"}


def test_a_run_tells_and_keeps_its_samples(tiny_run, tmp_path: Path, capsys) -> None:
    config = tiny_run(tmp_path, sample_prompts=["Anna paid 3 euros."], sample_rows=1, eval_steps=2, max_steps=2,
                      sample_max_new_tokens=3)  # fmt: skip
    run = pipeline.train(config, progress="plain")
    records = [json.loads(line) for line in (run.output_dir / "samples.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [2, 2]
    assert records[0]["prompt"] == "Anna paid 3 euros."
    assert records[1]["prompt"] == [{"role": "user", "content": "Anna paid 0 euros."}]
    assert records[1]["reference"] == '{"amount": 0}'
    said = capsys.readouterr().out
    assert "step 2/2  sample  Anna paid 3 euros.  ->  " in said
    pipeline.train(config.model_copy(update={"overwrite_output_dir": True, "sample_rows": 0}), progress="json")
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["prompt"] for event in events if event["event"] == "sample"] == ["Anna paid 3 euros."]
    assert len((run.output_dir / "samples.jsonl").read_text().splitlines()) == 1


def prompts(tiny_run, folder: Path, content: str, name: str = "prompts.jsonl", **keys: Any):
    (folder / name).write_text(content)
    config = tiny_run(folder, sample_prompts=str(folder / name), **keys)
    return prompts_of(config, read_tokenizer(config), {})


def test_files_of_prompts_of_every_form(tiny_run, tmp_path: Path) -> None:
    lines = ["Hello", [USER], {"prompt": "Hello"}, {"messages": [USER, ASSISTANT]}, {"prompt": [USER]}]
    made = prompts(tiny_run, tmp_path, "".join(json.dumps(line) + "\n\n" for line in lines))
    assert [prompt.asked for prompt in made] == [[USER]] * 5
    assert [prompt.reference for prompt in made] == [None, None, None, "Good day", None]
    assert [prompt.shown for prompt in made] == ["Hello", [USER], "Hello", [USER], [USER]]
    made = prompts(tiny_run, tmp_path, " Hello \n\nthere\n", "prompts.txt")
    assert [prompt.shown for prompt in made] == ["Hello", "there"]
    made = prompts(tiny_run, tmp_path, "Once\n", "prompts.txt", method="pretrain")
    assert made[0].asked == "Once"


@pytest.mark.parametrize(
    ("content", "name", "said"),
    [
        ("{", "prompts.jsonl", "line 1 is not JSON"),
        ("\n3", "prompts.jsonl", "prompt 2: neither a text nor turns"),
        (json.dumps([{"role": "user"}]), "prompts.jsonl", "neither a text nor turns"),
        (json.dumps([ASSISTANT]), "prompts.jsonl", "an answer without a prompt"),
        ("Hello", "prompts.csv", r"names no file of prompts(.|\n)*csv"),
    ],
)
def test_what_is_no_prompt_is_named(tiny_run, tmp_path: Path, content: str, name: str, said: str) -> None:
    with pytest.raises(DataError, match=said):
        prompts(tiny_run, tmp_path, content, name)


def test_rows_without_answers_cannot_be_sampled(tiny_run, tmp_path: Path) -> None:
    (tmp_path / "held_out.txt").write_text("Anna paid.\n")
    config = tiny_run(tmp_path, eval_dataset=str(tmp_path / "held_out.txt"), sample_rows=1)
    with pytest.raises(DataError, match="sample_rows asks for answers"):
        read_held_out(config, read_tokenizer(config))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"sample_steps": 2}, "nothing to answer"),
        ({"sample_rows": 2, "eval_dataset": None}, "no rows are held out"),
        ({"sample_prompts": ["a"], "eval_dataset": None}, "give sample_steps"),
        ({"sample_prompts": ["a"], "method": "reward"}, "a model that gives scores"),
    ],
)
def test_keys_that_do_not_fit_are_refused(tiny_run, tmp_path: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tiny_run(tmp_path, **keys)
