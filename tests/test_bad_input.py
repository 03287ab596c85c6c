"""What does not fit is found early, named by file, row or key, and loses nothing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fourfold import pipeline
from fourfold.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    DataError,
    FourfoldError,
    QuantizationError,
)

pytestmark = pytest.mark.usefixtures("one_quiet_thread")


def _broken_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def _broken_shard(folder: Path) -> None:
    shard = folder / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])


def _pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")


def _not_a_number(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _no_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()


@pytest.mark.parametrize(
    ("break_it", "error", "said"),
    [
        (shutil.rmtree, CheckpointError, "no (checkpoint at|model|tokenizer for) .*broken"),
        (_broken_config, CheckpointError, r"config\.json"),
        (_broken_shard, CheckpointError, r"model\.safetensors is cut short"),
        (_pickle, CheckpointError, r"pytorch_model\.bin is a pickle"),
        (_not_a_number, QuantizationError, r"model\.layers\.1\.mlp\.up_proj\.weight"),
        (_no_template, DataError, "has no chat template"),
    ],
)
def test_a_bad_checkpoint_is_named_and_leaves_no_run(tiny_run, tiny_llama, tmp_path, break_it, error, said) -> None:
    base = tmp_path / "broken"
    shutil.copytree(tiny_llama, base)
    break_it(base)
    with pytest.raises(error, match=said) as fault:
        pipeline.train(tiny_run(tmp_path, model_name_or_path=str(base)), progress="silent")
    assert "Traceback" not in str(fault.value)
    assert not (tmp_path / "run").exists()


GOOD = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


@pytest.mark.parametrize(
    ("rows", "keys", "said"),
    [
        ([], {}, r"train\.jsonl is empty"),
        ([GOOD, {"messages": [{"role": "user"}]}], {}, r"train\.jsonl, row 2: .*content"),
        (
            [GOOD] * 9 + [{"messages": None}],
            {"eval_dataset": None, "eval_split_fraction": 0.3},
            r"train\.jsonl, row 10",
        ),
        ([GOOD], {"eval_dataset": None, "eval_split_fraction": 0.3}, r"train\.jsonl cannot be split"),
        ([{"question": "a", "reply": "b"}], {}, r"train\.jsonl.*"),
        ([GOOD], {"max_length": 3}, r"train\.jsonl: every row is longer than max_length = 3"),
        ([GOOD], {"max_length": 5, "overlong": "truncate"}, r"train\.jsonl: all labels are masked"),
        ([GOOD], {"pad_token": "<none>"}, "pad_token is not in the tokenizer's vocabulary"),
        ([GOOD], {"chat_template": "absent.jinja"}, r"no such file: absent\.jinja(.|\n)*key chat_template"),
        ([GOOD], {"eval_dataset": "./absent.jsonl"}, r"\./absent\.jsonl does not exist"),
    ],
)
def test_bad_rows_are_named_by_file_and_row(tiny_run, tmp_path, rows, keys, said) -> None:
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=said):
        pipeline.train(tiny_run(tmp_path, **keys), progress="silent")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("keys", "error", "said"),
    [
        ({"target_modules": ["q_proj", "w_proj"]}, AdapterError, r"w_proj(.|\n)*k_proj"),
        ({"adapter": None}, ConfigError, "load_in_4bit"),
        ({"device": "cuda:99"}, ConfigError, r"cuda:99(.|\n)*cpu"),
        ({"resume_from_checkpoint": "absent"}, CheckpointError, "no checkpoint at absent"),
        ({"modules_to_not_convert": ["absent"]}, QuantizationError, "absent"),
        ({"train_dataset": None}, ConfigError, "train_dataset"),
        ({"lora_r": 99, "init_lora_weights": "pissa"}, AdapterError, "lora_r=99"),
    ],
)
def test_keys_that_do_not_fit_the_model_or_the_machine_are_named(tiny_run, tmp_path, keys, error, said) -> None:
    with pytest.raises(error, match=said):
        pipeline.train(tiny_run(tmp_path, **keys), progress="silent")
    assert not (tmp_path / "run").exists()


def test_a_run_folder_that_is_a_file_is_refused(tiny_run, tmp_path) -> None:
    (tmp_path / "run").write_text("mine")
    with pytest.raises(ConfigError, match=r"output_dir .*run is a file"):
        pipeline.train(tiny_run(tmp_path), progress="silent")
    assert (tmp_path / "run").read_text() == "mine"


def test_conversations_above_max_length_are_counted_and_named_in_the_output(tiny_run, tmp_path, capsys) -> None:
    config = tiny_run(tmp_path, max_length=60, max_steps=1, eval_dataset=None)
    long = {"messages": [{"role": "user", "content": "word " * 40}, {"role": "assistant", "content": "yes"}]}
    path = Path(config.train_dataset or "")
    path.write_text(path.read_text() + json.dumps(long) + "\n")
    pipeline.train(config)
    said = capsys.readouterr().out
    assert "24 of 25 rows" in said
    assert "1 rows above 60 tokens were dropped: rows 25" in said
    assert "| rows above max_length (drop) | 1 |" in (tmp_path / "run" / "README.md").read_text()


@pytest.mark.parametrize("packing", [False, True])
def test_held_out_rows_that_are_trained_on_are_told_by_train(tiny_run, tmp_path, capsys, packing) -> None:
    (tmp_path / "held_out.jsonl").write_text(json.dumps(GOOD) + "\n")
    config = tiny_run(tmp_path, max_steps=1, packing=packing)
    rows = (tmp_path / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "held_out.jsonl").write_text("".join([json.dumps(GOOD) + "\n", *rows[3:6]]))
    pipeline.train(config)
    assert "warning: 3 of 4 held-out rows are trained on, too" in capsys.readouterr().out


def test_for_machines_the_output_is_json_lines_with_data_and_size(tiny_run, tmp_path, capsys) -> None:
    pipeline.train(tiny_run(tmp_path, max_steps=1, eval_dataset=None), progress="json")
    events = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [event["event"] for event in events[:3]] == ["data", "model", "log"]
    assert events[0]["rows_overlong"] == 0
    assert events[1]["num_quantized"] == 73_728


def test_a_chat_template_is_read_from_its_file(tiny_run, tmp_path) -> None:
    template = "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    (tmp_path / "mine.jinja").write_text(template)
    run = pipeline.train(tiny_run(tmp_path, max_steps=1, chat_template=str(tmp_path / "mine.jinja")), progress="silent")
    assert (run.output_dir / "adapter" / "chat_template.jinja").read_text() == template
    assert pipeline.chat(str(run.output_dir)).tokenizer.chat_template == template


def test_unknown_progress_and_nothing_to_evaluate_on_are_refused(tiny_run, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"progress(.|\n)*loud"):
        pipeline.train(tiny_run(tmp_path), progress="loud")
    with pytest.raises(ConfigError, match="nothing to evaluate on"):
        pipeline.evaluate(tiny_run(tmp_path, eval_dataset=None))
    for verb in (pipeline.inspect, lambda config: pipeline.quantize_checkpoint(config, tmp_path / "out")):
        with pytest.raises(ConfigError, match="load_in_4bit: false"):
            verb(tiny_run(tmp_path, load_in_4bit=False))


def test_any_error_of_ours_carries_its_exit_code() -> None:
    assert {kind.exit_code for kind in FourfoldError.__subclasses__()} == {1, 2}
    assert ConfigError.exit_code == 2
