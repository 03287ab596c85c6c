"""The whole flow, over a tiny model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from fourfold import pipeline
from fourfold.config import RunConfig, load_config
from fourfold.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    DataError,
)
from fourfold.export.verification import compare_logits, reference_logits

pytestmark = pytest.mark.usefixtures("one_quiet_thread")

LEFT_BY_A_RUN = {
    "README.md",
    "adapter",
    "checkpoint-2",
    "checkpoint-4",
    "config.yaml",
    "events.jsonl",
    "loss.png",
    "metrics.jsonl",
    "report.html",
}
PROMPT = [{"role": "user", "content": "Anna paid 6 euros."}]


@pytest.fixture(scope="module")
def finished(tiny_run, tmp_path_factory) -> tuple[RunConfig, pipeline.Run]:
    """A run in NF4 that measured all there is to measure. Shared: it is not written to."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "text.txt").write_text("Anna paid 6 euros. " * 20)
    config = tiny_run(
        folder,
        eval_generate_rows=2,
        eval_max_new_tokens=4,
        perplexity_text=str(folder / "text.txt"),
        perplexity_max_length=64,
        perplexity_stride=32,
        gradient_checkpointing=True,
    )
    return config, pipeline.train(config, progress="silent")


def adapter_of(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter" / "adapter_model.safetensors")


def logits_of(session: pipeline.ChatSession) -> torch.Tensor:
    ids = session.tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=True)["input_ids"]
    return reference_logits(session.model, [ids])[0]


def reply(folder: str | Path) -> str:
    return "".join(pipeline.chat(str(folder), max_new_tokens=6).reply(PROMPT))


# ---- What a run leaves ----


def test_a_run_folder_holds_what_was_made_and_nothing_else(finished) -> None:
    config, run = finished
    assert {path.name for path in run.output_dir.iterdir()} == LEFT_BY_A_RUN | {"answers.jsonl"}
    # The optimizer that was chosen is part of what the run is.
    assert load_config(run.output_dir / "config.yaml") == config.model_copy(update={"optim": "adamw"})
    records = [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if "loss" in record] == [1, 2, 4]
    assert (run.output_dir / "loss.png").read_bytes().startswith(b"\x89PNG")
    adapter = {path.name for path in (run.output_dir / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "chat_template.jinja"} <= adapter


def test_the_metrics_of_a_run_are_those_of_its_last_step(finished) -> None:
    config, run = finished
    assert {"train_loss", "eval_loss", "exact_match", "perplexity", "memory_peak_bytes", "train_seconds"} <= set(
        run.metrics
    )
    assert run.metrics["exact_match_rows"] == len(run.samples) == 2
    measured = pipeline.evaluate(config, progress="silent")
    keys = ("eval_loss", "exact_match", "exact_match_rows", "perplexity", "perplexity_num_tokens")
    assert [measured[key] for key in keys] == pytest.approx([run.metrics[key] for key in keys], rel=1e-5)


def test_the_model_card_says_how_the_run_was_made(finished) -> None:
    config, run = finished
    for card in (run.output_dir / "README.md", run.output_dir / "adapter" / "README.md"):
        text = card.read_text()
        for said in (config.train_dataset, "| training rows | 24 |", "learning_rate", "nf4", "lora_r", "transformers"):
            assert said in text, said
        assert f"{run.metrics['eval_loss']:.6g}" in text


def test_the_adapter_loads_in_plain_peft_over_bitsandbytes_with_the_same_logits(finished, tiny_llama) -> None:
    _, run = finished
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tiny_llama,
        dtype=torch.float32,
        quantization_config=transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.float32,
        ),
    )
    theirs = peft.PeftModel.from_pretrained(base, run.output_dir / "adapter")
    ours = logits_of(pipeline.chat(str(run.output_dir)))
    ids = pipeline.chat(str(run.output_dir)).tokenizer.apply_chat_template(
        PROMPT, add_generation_prompt=True, return_dict=True
    )["input_ids"]
    # bitsandbytes' CPU path rounds to bf16; without the adapter the difference is ten times as large.
    assert compare_logits([ours], reference_logits(theirs, [ids])).relative_error < 0.01
    with theirs.disable_adapter():
        assert compare_logits([ours], reference_logits(theirs, [ids])).relative_error > 0.1


def test_training_changes_what_evaluation_measures(finished, tiny_run, tmp_path) -> None:
    config, run = finished
    untrained = config.model_copy(update={"output_dir": str(tmp_path / "none"), "perplexity_text": None})
    before = pipeline.evaluate(untrained, progress="silent")
    assert run.metrics["eval_loss"] < before["eval_loss"] - 0.1


# ---- Kinds of runs ----


@pytest.mark.parametrize(
    "keys",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"packing": True},
        {"load_in_4bit": False},
        {"load_in_4bit": False, "init_lora_weights": "pissa"},
        {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False, "lora_dropout": 0.1},
        {"bnb_4bit_quant_type": "int8", "target_modules": ["q_proj", "v_proj"]},
        {"bnb_4bit_quant_type": "int4", "modules_to_save": ["lm_head"]},
        {"eval_dataset": None, "eval_split_fraction": 0.25, "init_lora_weights": "gaussian"},
    ],
    ids=lambda keys: ",".join(keys) if "load_in_4bit" not in keys else "dense," + ",".join(keys),
)
def test_every_kind_of_run_trains_merges_and_answers_alike(tiny_run, tmp_path, keys) -> None:
    config = tiny_run(tmp_path, **keys)
    run = pipeline.train(config, progress="silent")
    assert run.metrics["eval_loss"] < 5.9
    assert pipeline.evaluate(config, progress="silent")["eval_loss"] == pytest.approx(
        run.metrics["eval_loss"], rel=1e-4
    )
    report = pipeline.merge(str(run.output_dir), tmp_path / "merged")
    assert report.difference.relative_error < report.bound
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert not hasattr(merged.config, "quantization_config")
    session = pipeline.chat(str(run.output_dir))
    ids = session.tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=True)["input_ids"]
    torch.testing.assert_close(reference_logits(merged, [ids])[0], logits_of(session), rtol=0.05, atol=0.02)


@pytest.mark.parametrize(
    "keys",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa_niter_4", "modules_to_save": ["lm_head"]},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "loftq", "loftq_iterations": 2},
    ],
    ids=lambda keys: "-".join(map(str, keys.values())),
)
def test_a_base_that_the_initialisation_changed_stays_with_its_adapter(tiny_run, tmp_path, keys) -> None:
    config = tiny_run(tmp_path, **keys)
    run = pipeline.train(config, progress="silent")
    changes = keys != {"init_lora_weights": "loftq"}
    assert (run.output_dir / "base").is_dir() == changes
    base = json.loads((run.output_dir / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert base == (str(run.output_dir / "base") if changes else config.model_name_or_path)
    assert pipeline.evaluate(config, progress="silent")["eval_loss"] == pytest.approx(
        run.metrics["eval_loss"], rel=1e-4
    )
    pipeline.merge(str(run.output_dir), tmp_path / "merged")
    session = pipeline.chat(str(run.output_dir))
    if changes:
        # bitsandbytes reads the base, PEFT the adapter.
        theirs = peft.PeftModel.from_pretrained(
            transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), run.output_dir / "adapter"
        )
        assert "Linear4bit" in str(theirs)
        ids = session.tokenizer.apply_chat_template(PROMPT, add_generation_prompt=True, return_dict=True)["input_ids"]
        assert compare_logits([logits_of(session)], reference_logits(theirs, [ids])).relative_error < 0.01
        with pytest.raises(ConfigError, match="base that its initialisation changed"):
            pipeline.merge(str(run.output_dir), tmp_path / "other", onto="original")
        # A checkpoint belongs to that base as well.
        assert reply(run.output_dir / "checkpoint-4") == reply(run.output_dir)


def test_a_quantized_checkpoint_is_a_base_like_any_other(tiny_run, tmp_path, finished) -> None:
    config, run = finished
    base = tmp_path / "base"
    size = pipeline.quantize_checkpoint(config, base)
    assert size.bits_per_quantized_weight == pytest.approx(4.127, abs=0.03)
    again = pipeline.train(tiny_run(tmp_path, model_name_or_path=str(base)), progress="silent")
    for name, tensor in adapter_of(again.output_dir).items():
        torch.testing.assert_close(tensor, adapter_of(run.output_dir)[name], rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match="no 16-bit weights to merge onto"):
        pipeline.merge(str(again.output_dir), tmp_path / "merged", onto="original")
    with pytest.raises(CheckpointError, match="is quantized already"):
        pipeline.quantize_checkpoint(load_config(again.output_dir), tmp_path / "twice")
    with pytest.raises(AdapterError, match="LoftQ needs the original 16-bit weights"):
        pipeline.train(
            tiny_run(tmp_path, model_name_or_path=str(base), output_dir=str(tmp_path / "l"), init_lora_weights="loftq"),
            progress="silent",
        )


def test_a_run_whose_base_streams_is_the_run_that_keeps_it(tiny_run, tiny_llama, tmp_path) -> None:
    dense = tmp_path / "dense"
    shutil.copytree(tiny_llama, dense)
    # More layers than pass through memory at a time.
    shape = transformers.LlamaConfig.from_pretrained(dense, num_hidden_layers=5)
    transformers.set_seed(0)
    transformers.LlamaForCausalLM(shape).save_pretrained(dense)
    base = tmp_path / "base"
    pipeline.quantize_checkpoint(tiny_run(tmp_path, model_name_or_path=str(dense)), base)
    runs, measured, replies = {}, {}, {}
    for source in (None, "host", "disk"):
        config = tiny_run(
            tmp_path, model_name_or_path=str(base), output_dir=str(tmp_path / str(source)), stream_base=source
        )
        runs[source] = pipeline.train(config, progress="silent")
        measured[source] = pipeline.evaluate(config, progress="silent")
        replies[source] = reply(runs[source].output_dir)
    for source in ("host", "disk"):
        ours, theirs = adapter_of(runs[source].output_dir), adapter_of(runs[None].output_dir)
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
        assert measured[source] == measured[None]
        assert replies[source] == replies[None]
    # The base alone, without an adapter.
    alone = tiny_run(
        tmp_path, model_name_or_path=str(base), output_dir=str(tmp_path / "none"), eval_generate_rows=2, adapter=None
    )
    with_stream = alone.model_copy(update={"stream_base": "host"})
    assert pipeline.evaluate(with_stream, "silent") == pipeline.evaluate(alone, "silent")
    # Resumed, and with a base that its initialisation changed, which is in no file as long as it was not saved.
    pissa = tiny_run(
        tmp_path,
        model_name_or_path=str(dense),
        output_dir=str(tmp_path / "pissa"),
        init_lora_weights="pissa",
        stream_base="host",
    )
    left = adapter_of(pipeline.train(pissa, progress="silent").output_dir)
    again = pissa.model_copy(update={"resume_from_checkpoint": str(tmp_path / "pissa" / "checkpoint-2")})
    again = again.model_copy(update={"stream_base": "disk"})
    resumed = adapter_of(pipeline.train(again, progress="silent").output_dir)
    assert all(torch.equal(resumed[name], left[name]) for name in left)


# ---- Runs that are resumed, overwritten, moved ----


@pytest.mark.parametrize("method", [True, "pissa_niter_4"])
def test_a_resumed_run_ends_with_the_weights_and_metrics_of_one_that_was_not_interrupted(
    tiny_run, tmp_path, method
) -> None:
    config = tiny_run(tmp_path, output_dir=str(tmp_path / "whole"), init_lora_weights=method, lora_dropout=0.1)
    whole = pipeline.train(config, progress="silent")
    broken = tmp_path / "broken"
    shutil.copytree(whole.output_dir, broken)
    for name in ("checkpoint-4", "adapter"):
        shutil.rmtree(broken / name)
    resumed = load_config(broken, ["--resume_from_checkpoint", "auto"])
    run = pipeline.train(resumed, progress="silent")
    assert adapter_of(whole.output_dir).keys() == adapter_of(broken).keys()
    for name, tensor in adapter_of(whole.output_dir).items():
        torch.testing.assert_close(adapter_of(broken)[name], tensor, rtol=1e-5, atol=1e-7, msg=name)
    for key in ("train_loss", "eval_loss"):
        assert run.metrics[key] == pytest.approx(whole.metrics[key], rel=1e-6)
    assert load_config(broken / "config.yaml").resume_from_checkpoint is None


def test_a_run_is_not_overwritten_unless_asked_and_then_wholly(tiny_run, tmp_path) -> None:
    first = tiny_run(tmp_path, init_lora_weights="pissa_niter_4", max_steps=6)
    pipeline.train(first, progress="silent")
    with pytest.raises(ConfigError, match="holds a run already"):
        pipeline.train(first, progress="silent")
    # A fault that is found before training begins takes nothing away.
    (tmp_path / "bad.jsonl").write_text('{"note": "no conversation"}\n')
    faulty = tiny_run(tmp_path, overwrite_output_dir=True, train_dataset=str(tmp_path / "bad.jsonl"))
    with pytest.raises(DataError):
        pipeline.train(faulty, progress="silent")
    assert (tmp_path / "run" / "checkpoint-6").is_dir()
    assert (tmp_path / "run" / "base").is_dir()
    run = pipeline.train(tiny_run(tmp_path, overwrite_output_dir=True), progress="silent")
    assert {path.name for path in run.output_dir.iterdir()} == LEFT_BY_A_RUN
    assert not load_config(run.output_dir).overwrite_output_dir


def test_a_moved_run_answers_measures_and_merges_where_it_is_now(finished, tiny_run, tmp_path, monkeypatch) -> None:
    config = tiny_run(tmp_path, init_lora_weights="pissa")
    run = pipeline.train(config, progress="silent")
    said = reply(run.output_dir)
    moved = tmp_path / "elsewhere" / "moved"
    moved.parent.mkdir()
    run.output_dir.rename(moved)
    monkeypatch.chdir(moved.parent)
    for folder in (moved, Path("moved"), Path("moved/adapter"), Path("moved") / "checkpoint-4"):
        assert reply(folder) == said
    monkeypatch.chdir(moved / "adapter")
    assert reply(".") == said
    measured = pipeline.evaluate(load_config(moved), progress="silent")
    assert measured["eval_loss"] == pytest.approx(run.metrics["eval_loss"], rel=1e-4)
    pipeline.merge(str(moved), tmp_path / "merged")


def test_a_run_whose_base_is_gone_says_where_to_name_it(tiny_run, tiny_llama, tmp_path) -> None:
    base = tmp_path / "models" / "tiny"
    shutil.copytree(tiny_llama, base)
    run = pipeline.train(tiny_run(tmp_path, model_name_or_path=str(base), max_steps=1), progress="silent")
    shutil.rmtree(base)
    with pytest.raises(CheckpointError, match=r"base model .* is gone(.|\n)*model_name_or_path in .*config.yaml"):
        pipeline.chat(str(run.output_dir))


def test_a_run_that_did_not_end_says_how_to_end_it(finished, tmp_path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(finished[1].output_dir, copy)
    shutil.rmtree(copy / "adapter")
    with pytest.raises(CheckpointError, match=r"has no adapter(.|\n)*--resume_from_checkpoint auto"):
        pipeline.chat(str(copy))
    assert reply(copy / "checkpoint-4") == reply(finished[1].output_dir)


def test_an_adapter_without_its_run_is_refused_by_name(finished, tmp_path) -> None:
    shutil.copytree(finished[1].output_dir / "adapter", tmp_path / "alone")
    for verb in (
        lambda: pipeline.chat(str(tmp_path / "alone")),
        lambda: pipeline.merge(str(tmp_path / "alone"), tmp_path / "out"),
    ):
        with pytest.raises(CheckpointError, match=r"no run at .*alone(.|\n)*an adapter without its run"):
            verb()


def test_evaluation_says_what_it_measures(finished, tmp_path, capsys) -> None:
    config, run = finished
    alone = {"perplexity_text": None, "eval_generate_rows": 0}
    pipeline.evaluate(config.model_copy(update=alone))
    assert f"measuring {run.output_dir / 'adapter'} on {config.model_name_or_path}" in capsys.readouterr().out
    pipeline.evaluate(config.model_copy(update=alone | {"output_dir": str(tmp_path / "none")}))
    assert "itself: there is no adapter" in capsys.readouterr().out
