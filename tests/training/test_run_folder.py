from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import tiny
import yaml
from matplotlib.image import imread
from peft import PeftModel
from transformers import AutoTokenizer

from fourfold.errors import CheckpointError
from fourfold.training.run_folder import (
    MetricsCallback,
    ModelCard,
    append_metrics,
    draw_loss,
    metrics_record,
    read_metrics,
    save_adapter,
    write_config,
    write_metrics,
    write_model_card,
)


def test_metrics_file_holds_each_log_once_even_after_a_resume(tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    tiny.trainer(tmp_path, callbacks=(MetricsCallback(tmp_path),), **options).train()
    path = tmp_path / "metrics.jsonl"
    first = read_metrics(path)
    tiny.trainer(tmp_path, callbacks=(MetricsCallback(tmp_path),), **options).train(
        resume_from_checkpoint=tmp_path / "checkpoint-2"
    )
    second = read_metrics(path)
    assert [r["step"] for r in second if "loss" in r] == [1, 2, 3, 4]
    assert [r["loss"] for r in second if "loss" in r] == [r["loss"] for r in first if "loss" in r]


def test_a_log_is_whole_after_a_resume_whatever_the_steps_of_saving(tmp_path: Path) -> None:
    options = {"max_steps": 7, "logging_steps": 4, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 3}
    tiny.trainer(tmp_path, callbacks=(MetricsCallback(tmp_path),), **options).train()
    whole = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "loss" in r]
    tiny.trainer(tmp_path, callbacks=(MetricsCallback(tmp_path),), **options).train(
        resume_from_checkpoint=tmp_path / "checkpoint-3"
    )
    resumed = [r for r in read_metrics(tmp_path / "metrics.jsonl") if "loss" in r]
    assert [(r["step"], r["loss"], r["num_tokens"]) for r in resumed] == [
        (r["step"], r["loss"], r["num_tokens"]) for r in whole
    ]


def test_metrics_are_json_even_when_a_number_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    append_metrics(path, metrics_record(1, {"loss": 1.5, "grad_norm": math.inf}))
    append_metrics(path, metrics_record(2, {"eval_loss": math.nan}))
    lines = [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 1.5, "grad_norm": None}, {"step": 2, "eval_loss": None}]
    write_metrics(path, lines[:1])
    assert read_metrics(path) == lines[:1]


def test_last_metrics_line_cut_by_a_crash_is_left_out_and_others_are_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    assert read_metrics(path) == [{"step": 1}]
    path.write_text('{"st\n{"step": 2}\n')
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl, line 1"):
        read_metrics(path)


@pytest.mark.parametrize("count", [0, 1, 30])
def test_loss_picture_is_drawn_for_any_number_of_logs(tmp_path: Path, count: int) -> None:
    records = [{"step": step, "loss": 2 * math.exp(-step / 10)} for step in range(1, count + 1)]
    records += [{"step": count, "eval_loss": 0.7}] if count else []
    picture = imread(draw_loss(tmp_path / "loss.png", records, title="a run"))
    assert picture.shape[:2] == (630, 1080)
    assert picture.min() < 0.5


def test_configuration_survives_as_yaml(tmp_path: Path) -> None:
    config = {"model_name_or_path": "model", "lora_r": 16, "target_modules": ["q_proj"], "name": "Zoë"}
    assert yaml.safe_load(write_config(tmp_path, config).read_text(encoding="utf-8")) == config
    assert write_config(tmp_path, "a: 1\n").read_text() == "a: 1\n"


def test_adapter_folder_loads_with_its_tokenizer_and_chat_template(tmp_path: Path) -> None:
    model, tokenizer = tiny.peft_model(), tiny.tokenizer()
    folder = save_adapter(tmp_path, model, tokenizer)
    assert (folder / "chat_template.jinja").is_file()
    assert not list(folder.glob("*.bin"))
    assert AutoTokenizer.from_pretrained(folder).chat_template == tokenizer.chat_template
    weights = tiny.adapter_weights(model)
    for name, value in PeftModel.from_pretrained(tiny.base_model(), folder).named_parameters():
        if name in weights:
            assert value.equal(weights[name])


def test_model_card_says_how_it_was_made(tmp_path: Path) -> None:
    draw_loss(tmp_path / "loss.png", [])
    card = ModelCard(
        name="invoices",
        base_model="org/base",
        data={"train": "rows.jsonl", "train rows": 1200},
        quantization={"bnb_4bit_quant_type": "nf4"},
        lora={"r": 16, "target_modules": ["q_proj", "v_proj"]},
        hyperparameters={"learning_rate": 2e-4},
        results={"exact match": 0.93, "note": "a | b"},
        command="fourfold train run.yaml",
    )
    text = write_model_card(tmp_path, card).read_text()
    header = yaml.safe_load(text.split("---")[1])
    assert header["base_model"] == "org/base"
    for said in ("fourfold train run.yaml", "| r | 16 |", "q_proj, v_proj", "0.0002", "loss.png", "a \\| b"):
        assert said in text
    assert "| torch | " in text
