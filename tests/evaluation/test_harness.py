"""lm-evaluation-harness over our models, against its own model class and by tasks in local files."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fourfold.errors import ConfigError, DataError
from fourfold.evaluation.harness import HarnessOptions, check_harness, run_harness

lm_eval = pytest.importorskip("lm_eval")
pytest.importorskip("lm_eval.tasks")
pytestmark = pytest.mark.usefixtures("one_quiet_thread")

ROWS = [
    {"question": "Who paid 3 euros?", "choices": ["Anna", "the baker in Paris", "Emil"], "answer": 1},
    {"question": "What is the capital of France?", "choices": ["Paris", "a helpful assistant"], "answer": 0},
    {"question": "Which currency?", "choices": ["EUR", "date", "euros on 7 March"], "answer": 2},
]
CHOICE = """
task: payments_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITTEN = """
task: payments_written
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["\\n"], max_gen_toks: 5}}
metric_list: [{{metric: exact_match}}]
"""
TEXT = """
task: payments_text
dataset_path: json
dataset_kwargs: {{data_files: {{test: {rows}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{question}}}}"
metric_list: [{{metric: word_perplexity}}, {{metric: bits_per_byte}}]
"""


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    loaded = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        loaded.lm_head.weight.mul_(20)
    return loaded


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.fixture(scope="module")
def theirs(model: Any, tokenizer: Any) -> Any:
    """The harness's own class for models of Transformers."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=2048)


@pytest.fixture(scope="module")
def ours(model: Any, tokenizer: Any) -> Any:
    from fourfold.evaluation.harness_model import HarnessModel

    return HarnessModel(model, tokenizer, batch_size=2)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for name, text in (("choice", CHOICE), ("written", WRITTEN), ("text", TEXT)):
        (folder / f"{name}.yaml").write_text(text.format(rows=folder / "rows.jsonl"))
    return folder


def requests(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
    from lm_eval.api.instance import Instance

    return [
        Instance(request_type=kind, doc={}, arguments=given, idx=index, metadata=("task", index, 1))
        for index, given in enumerate(arguments)
    ]


def test_likelihoods_are_those_of_the_harnesss_own_class(ours: Any, theirs: Any) -> None:
    asked = requests("loglikelihood", ("Who paid?", " Anna"), ("", "Paris is"), ("Spaces  ", "after"), ("a", " b c d"))
    wanted = theirs.loglikelihood(asked, disable_tqdm=True)
    found = ours.loglikelihood(asked, disable_tqdm=True)
    assert [one[0] for one in found] == pytest.approx([one[0] for one in wanted], rel=1e-4)
    assert [one[1] for one in found] == [bool(one[1]) for one in wanted]


def test_texts_longer_than_the_model_are_scored_in_the_same_windows(ours: Any, theirs: Any, monkeypatch) -> None:
    monkeypatch.setattr(ours, "max_length", 16)
    monkeypatch.setattr(theirs, "_max_length", 16)
    asked = requests("loglikelihood_rolling", ("Paid Nordwind 1,249.50 euros on 7 March 2024. " * 3,), ("Yes.",))
    wanted = theirs.loglikelihood_rolling(asked, disable_tqdm=True)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(wanted, rel=1e-4)


def test_answers_are_those_of_the_harnesss_own_class_up_to_the_stop_text(ours: Any, theirs: Any) -> None:
    plain = {"until": ["<never>"], "max_gen_toks": 8}
    (whole,) = theirs.generate_until(requests("generate_until", ("Who paid?", plain)), disable_tqdm=True)
    stop = {"until": [whole[3:5]], "max_gen_toks": 8}
    asked = requests("generate_until", ("Who paid?", plain), ("Who paid?", stop), ("What is it?", plain))
    assert ours.generate_until(asked) == theirs.generate_until(asked, disable_tqdm=True)
    assert ours.generate_until(asked)[1] == whole[: whole.index(whole[3:5])]


def test_the_chat_template_is_applied_as_by_the_harnesss_own_class(ours: Any, theirs: Any) -> None:
    turns = [{"role": "user", "content": "Who paid?"}]
    assert ours.apply_chat_template(turns) == theirs.apply_chat_template(turns)
    begun = [*turns, {"role": "assistant", "content": "It was"}]
    found = ours.apply_chat_template(begun, add_generation_prompt=False)
    assert found == theirs.apply_chat_template(begun, add_generation_prompt=False)
    assert found.endswith("It was")


def test_tasks_in_local_files_are_run_as_the_harness_runs_them(
    model: Any, tokenizer: Any, theirs: Any, tasks: Path
) -> None:
    names = ("payments_choice", "payments_written", "payments_text")
    state = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), dict(os.environ)
    figures, counts = run_harness(model, tokenizer, HarnessOptions(names, tasks), batch_size=2)
    now = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state(), dict(os.environ)
    assert state[:2] == now[:2]
    assert torch.equal(state[2], now[2])
    assert state[3] == now[3]
    manager = lm_eval.tasks.TaskManager(include_path=str(tasks), include_defaults=False)
    wanted = lm_eval.simple_evaluate(theirs, tasks=list(names), task_manager=manager, bootstrap_iters=0)["results"]
    found = {figure.name: figure for figure in figures}
    assert found.keys() == {
        *(f"harness/payments_choice/{metric}" for metric in ("acc", "acc_norm")),
        "harness/payments_written/exact_match",
        *(f"harness/payments_text/{metric}" for metric in ("word_perplexity", "bits_per_byte")),
    }
    for name, figure in found.items():
        _, task, metric = name.split("/")
        assert figure.value == pytest.approx(wanted[task][f"{metric},none"], rel=1e-4), name
    assert found["harness/payments_choice/acc"].parts[:, 0].mean() == found["harness/payments_choice/acc"].value
    assert found["harness/payments_text/word_perplexity"].parts is None
    assert not found["harness/payments_text/word_perplexity"].higher_is_better
    assert counts == {f"harness/{name}/rows": 3 for name in names}


def test_a_task_is_a_file_too_of_fewer_rows_and_by_the_chat_template(model: Any, tokenizer: Any, tasks: Path) -> None:
    options = HarnessOptions((str(tasks / "choice.yaml"),), limit=2)
    figures, counts = run_harness(model, tokenizer, options, apply_chat_template=True)
    assert counts == {"harness/payments_choice/rows": 2}
    assert [figure.name for figure in figures] == ["harness/payments_choice/acc", "harness/payments_choice/acc_norm"]


def test_what_there_is_not_is_told_before_anything_is_run(tasks: Path, monkeypatch) -> None:
    with pytest.raises(ConfigError, match="names files that are not there"):
        check_harness(HarnessOptions(("none.yaml",)))
    with pytest.raises(ConfigError, match="harness_include_path is no folder"):
        check_harness(HarnessOptions(("payments_choice",), tasks / "none"))
    # The harness's own tasks are thousands of files.
    own = lm_eval.tasks.TaskManager
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda include_path, **_: own(None, include_path, False))
    with pytest.raises(ConfigError, match=r"unknown task(.|\n)*payments_choise(.|\n)*payments_choice"):
        check_harness(HarnessOptions(("payments_choise",), tasks))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed(.|\n)*fourfold\[harness\]"):
        check_harness(HarnessOptions(("payments_choice",), tasks))


def test_a_task_whose_data_is_not_here_is_told(model: Any, tokenizer: Any, tasks: Path, tmp_path: Path) -> None:
    (tmp_path / "gone.yaml").write_text(CHOICE.format(rows=tmp_path / "gone.jsonl"))
    with pytest.raises(DataError, match=r"gone\.yaml has no data here"):
        run_harness(model, tokenizer, HarnessOptions((str(tmp_path / "gone.yaml"),)))
