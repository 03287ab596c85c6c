"""Adapters that are weighed when training ends, in whole runs over a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from fourfold import pipeline

pytestmark = pytest.mark.usefixtures("one_quiet_thread")
WEIGHT = 0.7


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def is_weighed(left: dict[str, torch.Tensor], trained: dict[str, torch.Tensor]) -> bool:
    """Whether `left` is `trained` with each B multiplied in fp32 and rounded once, and nothing else changed."""
    assert left.keys() == trained.keys()
    return all(
        torch.equal(left[name], value * WEIGHT if "lora_B" in name or "lora_embedding_B" in name else value)
        for name, value in trained.items()
    )


def records_of(run: pipeline.Run) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run.output_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def weighed(tiny_run, tmp_path_factory) -> tuple[object, pipeline.Run]:
    """A run of a weighed adapter. Shared: it is not written to."""
    config = tiny_run(
        tmp_path_factory.mktemp("weighed"),
        adapter_weight=WEIGHT,
        use_rslora=True,
        eval_steps=2,
        eval_generate_rows=1,
        eval_max_new_tokens=2,
    )
    return config, pipeline.train(config, progress="silent")


def test_the_result_is_the_trained_adapter_times_the_weight_and_checkpoints_are_not(weighed) -> None:
    _, run = weighed
    left, trained = tensors(run.output_dir / "adapter"), tensors(run.output_dir / "checkpoint-4")
    assert any(value.abs().max() > 0 for name, value in trained.items() if "lora_B" in name)
    assert is_weighed(left, trained)
    # PEFT reads it without us, as an adapter whose change of a weight is the trained one's times the weight.
    one, other = (
        json.loads((run.output_dir / name / "adapter_config.json").read_text()) for name in ("adapter", "checkpoint-4")
    )
    assert (one["lora_alpha"], one["use_rslora"]) == (other["lora_alpha"], other["use_rslora"]) == (8, True)


def test_peft_merges_it_to_the_point_on_the_line_between_base_and_trained(weighed, tiny_llama) -> None:
    _, run = weighed

    def merged(folder: str) -> torch.Tensor:
        base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(base, run.output_dir / folder).merge_and_unload()
        return model.model.layers[0].self_attn.q_proj.weight.detach()

    base = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    plain = base.model.layers[0].self_attn.q_proj.weight.detach()
    trained, left = merged("checkpoint-4"), merged("adapter")
    assert (trained - plain).abs().max() > 1e-3
    torch.testing.assert_close(left, plain.lerp(trained, WEIGHT), rtol=0, atol=1e-6)


def test_what_is_told_of_the_run_is_of_the_weighed_adapter(weighed) -> None:
    config, run = weighed
    losses = [record["eval_loss"] for record in records_of(run) if "eval_loss" in record]
    measured = pipeline.evaluate(config, progress="silent")
    assert run.metrics["eval_loss"] == losses[-1] == pytest.approx(measured["eval_loss"], rel=1e-5)
    # While it trained, the loss was that of the adapter as it was.
    assert len(losses) == 3
    assert abs(losses[-1] - losses[-2]) > 1e-4
    for card in ("README.md", "adapter/README.md"):
        text = (run.output_dir / card).read_text()
        assert f"| adapter_weight | {WEIGHT} |" in text
        assert f"| eval_loss | {losses[-1]:.6g} |" in text


def test_a_run_says_on_the_terminal_that_the_adapter_was_weighed(tiny_run, tmp_path, capsys) -> None:
    config = tiny_run(tmp_path, max_steps=1, adapter_weight=0.5)
    pipeline.train(config, progress="plain")
    assert "adapter weighed by 0.5" in capsys.readouterr().out


def test_a_run_that_goes_on_ends_with_the_same_adapter_and_one_at_its_end_is_not_weighed_twice(
    weighed, tiny_run, tmp_path
) -> None:
    _, whole = weighed
    keys = {"use_rslora": True, "eval_steps": 2, "adapter_weight": WEIGHT}
    config = tiny_run(tmp_path, **keys)
    run = pipeline.train(config, progress="silent")
    for checkpoint in ("checkpoint-2", "checkpoint-4"):
        again = {"resume_from_checkpoint": str(run.output_dir / checkpoint)}
        pipeline.train(config.model_copy(update=again), progress="silent")
        left, expected = tensors(run.output_dir / "adapter"), tensors(whole.output_dir / "adapter")
        assert all(torch.equal(left[name], value) for name, value in expected.items()), checkpoint


def test_another_weight_needs_no_training_anew(tiny_run, tmp_path, capsys) -> None:
    config = tiny_run(tmp_path, max_steps=2)
    run = pipeline.train(config, progress="silent")
    again = config.model_copy(update={"resume_from_checkpoint": "auto", "adapter_weight": WEIGHT})
    pipeline.train(again, progress="plain")
    assert "changed, and with it the run from here on: adapter_weight 1.0 -> 0.7" in capsys.readouterr().out
    assert is_weighed(tensors(run.output_dir / "adapter"), tensors(run.output_dir / "checkpoint-2"))


def test_the_best_step_is_chosen_as_it_trained_and_weighed_as_the_result(tiny_run, tmp_path) -> None:
    # It learns in each step, so that the first one has the greatest loss.
    best = {"greater_is_better": True, "eval_steps": 1, "load_best_model_at_end": True}
    run = pipeline.train(tiny_run(tmp_path, adapter_weight=WEIGHT, **best), progress="silent")
    step = run.metrics["best_step"]
    assert step < 4
    assert is_weighed(tensors(run.output_dir / "adapter"), tensors(run.output_dir / f"checkpoint-{step}"))
    losses = [record["eval_loss"] for record in records_of(run) if record["step"] == step and "eval_loss" in record]
    assert [run.metrics["best_metric"], run.metrics["eval_loss"]] == losses


def test_adapters_on_a_16_bit_base_and_on_embeddings_are_weighed_too(tiny_run, tmp_path) -> None:
    keys = {"load_in_4bit": False, "target_modules": ["q_proj", "embed_tokens"], "init_lora_weights": "gaussian"}
    run = pipeline.train(tiny_run(tmp_path, max_steps=2, adapter_weight=WEIGHT, **keys), progress="silent")
    trained = tensors(run.output_dir / "checkpoint-2")
    assert any("lora_embedding_B" in name for name in trained)
    assert is_weighed(tensors(run.output_dir / "adapter"), trained)


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"adapter": None, "load_in_4bit": False}, "adapter: null trains all weights(.|\n)*give adapter_weight: 1"),
        ({"use_dora": True}, "use_dora scales the weight by a norm"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights: pissa gives it a part of the base"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: pissa_niter_4"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights: loftq"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save are trained beside it"),
        ({"method": "reward"}, "method: reward trains a layer of scores"),
        ({"requantize_every": 2}, "requantize_every leaves but the last part"),
        ({"adapter_weight": 0}, "greater than 0"),
        ({"adapter_weight": 1.5}, "less than or equal to 1"),
    ],
)
def test_what_a_weight_would_not_do_rightly_is_refused(tiny_run, tmp_path: Path, keys, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tiny_run(tmp_path, **({"adapter_weight": WEIGHT} | keys))
    if "adapter_weight" not in keys:
        tiny_run(tmp_path, **({"adapter_weight": 1} | keys))  # without a weight there is nothing to refuse
