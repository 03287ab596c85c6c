from __future__ import annotations

import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import fourfold
from fourfold.cli import app
from fourfold.evaluation.figures import IntervalOptions, mean_of
from fourfold.evaluation.side_by_side import Cost, MeasuredModel, compare_measured
from fourfold.evaluation.tasks import Measured


def model(name: str, scores: list[float], losses: list[float], left_out: dict[str, str]) -> MeasuredModel:
    answers = Measured((mean_of("exact_match", scores, is_share=True),), {"exact_match_rows": len(scores)})
    loss = Measured((mean_of("eval_loss", losses, higher_is_better=False),), {"eval_num_tokens": len(losses)})
    measured = {"answers": answers} if left_out else {"loss": loss, "answers": answers}
    return MeasuredModel(name, f"what {name} is", measured, Cost("cpu", 3 * 2**20, 2**30, 12.0, None, None), left_out)


@pytest.fixture
def evaluating(monkeypatch):
    """Gives a comparison, and notes what it was asked for."""
    module = types.ModuleType("fourfold.evaluating")
    module.calls = []
    losses = np.linspace(1.0, 2.0, 40)

    def compare(config, names, progress):
        module.calls.append((config, names))
        sys.stdout.write("chatter of a library\n")
        left_out = [{} for _ in names[:-1]] + [{"loss": "its tokenizer is not base16's"} if len(names) > 2 else {}]
        shares = ([0.0, 1.0, 0.0, 1.0], [1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 1.0, 1.0])
        models = [
            model(name, share, list(losses * (1 + index / 10)), out)
            for index, (name, share, out) in enumerate(zip(names, shares, left_out, strict=False))
        ]
        return compare_measured(models, IntervalOptions(num_resamples=200))

    module.compare = compare
    monkeypatch.setitem(sys.modules, "fourfold.evaluating", module)
    monkeypatch.setattr(fourfold, "evaluating", module, raising=False)
    return module


@pytest.fixture
def config_file(tmp_path: Path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: m\nperplexity_text: text.txt\n")
    return str(path)


def invoke(*words: str):
    return CliRunner().invoke(app, ["evaluate", *words])


def test_compare_takes_all_words_up_to_the_next_option_wherever_it_stands(evaluating, config_file) -> None:
    orders = (
        [config_file, "--compare", "base16", "base4", "adapter", "--perplexity_max_length", "2048", "--json"],
        ["--compare", "base16", "base4", "adapter", "--json", config_file, "--perplexity_max_length", "2048"],
        [config_file, "--perplexity_max_length", "2048", "--json", "--compare", "base16", "base4", "adapter"],
    )
    for words in orders:
        result = invoke(*words)
        assert result.exit_code == 0, result.output
        config, names = evaluating.calls.pop()
        assert names == ["base16", "base4", "adapter"]
        assert (config.model_name_or_path, config.perplexity_max_length) == ("m", 2048)


def test_without_a_config_the_first_model_or_run_gives_one(evaluating, tmp_path: Path) -> None:
    assert invoke("--compare", "some/model@nf4", "some/model", "--perplexity_text", "t.txt").exit_code == 0
    assert evaluating.calls[-1][0].model_name_or_path == "some/model"
    run = tmp_path / "run"
    (run / "adapter").mkdir(parents=True)
    (run / "config.yaml").write_text("model_name_or_path: of-the-run\nperplexity_text: text.txt\n")
    (run / "adapter" / "adapter_config.json").write_text("{}")
    assert invoke("--compare", "some/model", f"{run}@merged").exit_code == 0
    assert evaluating.calls[-1][0].model_name_or_path == "of-the-run"
    assert evaluating.calls[-1][0].output_dir == str(run)


def test_the_table_has_values_intervals_and_differences_and_says_what_does_not_compare(evaluating, config_file) -> None:
    result = invoke(config_file, "--compare", "base16", "base4", "adapter")
    assert result.exit_code == 0, result.output
    for said in (
        "eval_loss ↓", "exact_match ↑", "against base16", "+10.00% (+10.00% to +10.00%)", "+0.25 (",
        "does not compare", "adapter without loss: its tokenizer is not base16's", "peak memory, MiB", "not told",
        "95% intervals",
    ):  # fmt: skip
        assert said in result.stdout, said
    assert "written tokens/s" not in result.stdout


def test_json_is_one_value_with_the_same_numbers(evaluating, config_file, tmp_path: Path) -> None:
    picture = tmp_path / "a.png"
    result = invoke(config_file, "--compare", "base16", "base4", "--picture", str(picture), "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    loss = found["models"]["base4"]["figures"]["eval_loss"]
    assert loss["value"] == pytest.approx(1.65)
    assert loss["difference"]["relative"] == pytest.approx(0.1)
    assert found["picture"] == str(picture)
    assert picture.is_file()


def test_what_does_not_go_together_is_refused(evaluating, config_file, tmp_path: Path) -> None:
    assert "give a CONFIG" in invoke().stderr
    assert "requires an argument" in invoke(config_file, "--compare").stderr
    assert "needs --compare" in invoke(config_file, "--picture", "a.png").stderr
    for picture, said in (("a.bmp", "unknown kind"), (str(tmp_path / "none" / "a.png"), "no folder")):
        result = invoke(config_file, "--compare", "base16", "base4", "--picture", picture)
        assert (result.exit_code, said in result.stderr) == (2, True)
    assert not evaluating.calls
