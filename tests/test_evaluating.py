"""Models side by side: what is named, what is measured, what is refused."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from fourfold import pipeline
from fourfold.config import RunConfig
from fourfold.errors import AdapterError, CheckpointError, ConfigError, DataError
from fourfold.evaluating import compare
from fourfold.evaluation import perplexity
from fourfold.evaluation import tasks as evaluation_tasks
from fourfold.evaluation.picture import draw_comparison
from fourfold.evaluation.side_by_side import Comparison

pytestmark = pytest.mark.usefixtures("one_quiet_thread")
TEXT = "Anna paid 6 euros. Boris paid 7 euros to Nordwind on Monday. " * 8


@pytest.fixture(scope="module")
def config(tiny_run, tmp_path_factory) -> RunConfig:
    """Of a finished run. Shared: it is not written to."""
    folder = tmp_path_factory.mktemp("evaluating")
    (folder / "text.txt").write_text(TEXT)
    rows = [{"question": "Who paid?", "choices": ["Anna", "Boris", "Emil"], "answer": index % 3} for index in range(4)]
    (folder / "choices.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = tiny_run(
        folder,
        eval_generate_rows=3,
        eval_max_new_tokens=4,
        perplexity_text=str(folder / "text.txt"),
        perplexity_max_length=64,
        perplexity_stride=32,
        save_steps=4,
    )
    pipeline.train(config, progress="silent")
    return config


@pytest.fixture(scope="module")
def comparison(config) -> Comparison:
    asked = {
        "multiple_choice_dataset": str(Path(config.perplexity_text).with_name("choices.jsonl")),
        "eval_metrics": ["chrf"],
    }
    return compare(config.model_copy(update=asked), ["base16", "base4", "adapter", "merged"], progress="silent")


def figure(comparison: Comparison, name: str, model: str) -> float:
    return comparison.cells[name][model].value


def test_each_model_has_the_figures_that_evaluate_and_the_library_give_it(comparison, config, tiny_llama) -> None:
    alone = pipeline.evaluate(config, progress="silent")
    for name in ("eval_loss", "exact_match", "perplexity"):
        assert figure(comparison, name, "adapter") == pytest.approx(alone[name], rel=1e-6)
    untrained = pipeline.evaluate(config.model_copy(update={"output_dir": "none"}), progress="silent")
    assert figure(comparison, "eval_loss", "base4") == pytest.approx(untrained["eval_loss"], rel=1e-6)
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    theirs = perplexity(plain, tokenizer, TEXT, max_length=64, stride=32).value
    assert figure(comparison, "perplexity", "base16") == pytest.approx(theirs, rel=1e-5)


def test_the_merged_model_is_the_adapter_but_for_rounding_and_the_bases_are_not(comparison) -> None:
    merged = figure(comparison, "perplexity", "merged") / figure(comparison, "perplexity", "adapter") - 1
    base = figure(comparison, "perplexity", "base4") / figure(comparison, "perplexity", "adapter") - 1
    assert abs(merged) < 0.01 < abs(base)
    assert figure(comparison, "eval_loss", "adapter") < figure(comparison, "eval_loss", "base16") - 0.1


def test_differences_are_to_the_first_model_with_intervals_that_hold_them(comparison) -> None:
    assert list(comparison.cells) == [
        "eval_loss", "exact_match", "chrf", "perplexity", "multiple_choice_acc", "multiple_choice_acc_norm"
    ]  # fmt: skip
    for cells in comparison.cells.values():
        first = cells["base16"]
        assert first.difference is None
        for cell in cells.values():
            low, high = cell.interval
            assert low <= cell.value <= high
            if cell is not first:
                assert cell.difference.value == pytest.approx(cell.value - first.value)
                low, high = cell.difference.interval
                assert low <= cell.difference.value <= high
    # Over rows that all models find alike, the difference is far surer than the figures.
    loss = comparison.cells["eval_loss"]
    width = loss["adapter"].interval[1] - loss["adapter"].interval[0]
    low, high = loss["base4"].difference.interval
    assert high - low < width / 5


def test_what_each_took_is_told(comparison) -> None:
    costs = {model.name: model.cost for model in comparison.models}
    assert costs["base4"].weights_bytes < costs["base16"].weights_bytes < costs["merged"].weights_bytes * 1.01
    assert all(cost.scored_per_second > 0 and cost.generated_per_second > 0 for cost in costs.values())
    assert all(cost.peak_bytes > 2**20 and cost.joules is None and cost.device == "cpu" for cost in costs.values())


def test_all_models_answer_the_same_prompts(config, monkeypatch) -> None:
    asked: list[tuple[list[object], list[int]]] = []
    measure = evaluation_tasks.exact_match

    def noted(model, tokenizer, conversations, *rest):
        prompts = [tokenizer.apply_chat_template(turns, tokenize=True)["input_ids"] for turns in conversations]
        asked.append((conversations, prompts))
        return measure(model, tokenizer, conversations, *rest)

    monkeypatch.setattr(evaluation_tasks, "exact_match", noted)
    compare(config.model_copy(update={"perplexity_text": None}), ["base16", "adapter"], progress="silent")
    assert asked[0] == asked[1]
    assert len(asked) == 2


def test_a_comparison_is_data_and_a_picture(comparison, tmp_path) -> None:
    plain = json.loads(json.dumps(comparison.to_dict()))
    assert plain["reference"] == "base16"
    assert plain["models"]["adapter"]["figures"]["perplexity"]["difference"]["relative"] < 0
    assert plain["counts"]["exact_match_rows"] == 3
    for name, begin in (("a.png", b"\x89PNG"), ("a.svg", b"<?xml")):
        assert draw_comparison(tmp_path / name, comparison, "title").read_bytes().startswith(begin)


def test_models_are_named_by_folders_too(config, comparison, tiny_llama, tmp_path) -> None:
    """The run, its base in another format, an adapter without its run, and a merged folder."""
    pipeline.merge(config.output_dir, tmp_path / "merged")
    # A model that lies beside a file of that name is no part of a run.
    (tmp_path / "config.yaml").write_text("model_name_or_path: another\n")
    shutil.copytree(Path(config.output_dir) / "adapter", tmp_path / "elsewhere" / "alone")
    names = [
        config.output_dir,
        f"{config.output_dir}@base4",
        f"{tiny_llama}@int8",
        str(tiny_llama),
        str(tmp_path / "elsewhere" / "alone"),
        str(tmp_path / "merged"),
    ]
    found = compare(config.model_copy(update={"eval_generate_rows": 0}), names, progress="silent")
    values = {model: cell.value for model, cell in found.cells["perplexity"].items()}
    wanted = {
        names[0]: "adapter", names[1]: "base4", names[3]: "base16", names[4]: "adapter", names[5]: "merged"
    }  # fmt: skip
    for name, model in wanted.items():
        assert values[name] == pytest.approx(figure(comparison, "perplexity", model), rel=1e-4), name
    assert values[names[2]] == pytest.approx(figure(comparison, "perplexity", "base16"), rel=0.01)


@pytest.mark.parametrize(
    ("names", "error", "said"),
    [
        (["adapter"], ConfigError, "takes two models or more"),
        (["adapter", "base4", "adapter"], ConfigError, "names a model twice(.|\n)*adapter"),
        (["base4", "baes16"], ConfigError, r"baes16 names no model(.|\n)*base16"),
        (["base4", "model"], ConfigError, "model: the run at .* trained an adapter"),
        (["base4", "RUN@int4"], ConfigError, r"a run has no such model(.|\n)*merged"),
        (["base4", "MODEL@int3"], ConfigError, r"unknown number format(.|\n)*int3(.|\n)*nf4"),
        (["base4", "EMPTY"], CheckpointError, "names no model(.|\n)*an empty folder"),
        (["base4", "/none/such"], CheckpointError, "/none/such"),
    ],
)
def test_a_name_that_names_nothing_is_told_before_anything_is_loaded(
    config, tiny_llama, tmp_path, monkeypatch, names, error, said
) -> None:
    monkeypatch.setattr("fourfold.variants.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    (tmp_path / "empty").mkdir()
    places = {"RUN": config.output_dir, "MODEL": str(tiny_llama), "EMPTY": str(tmp_path / "empty")}
    for word, place in places.items():
        names = [name.replace(word, place) for name in names]
    with pytest.raises(error, match=said):
        compare(config, names, progress="silent")


def test_an_adapter_of_another_base_is_named(config, tiny_tokenizer, tmp_path) -> None:
    other = other_model(tmp_path / "other", tiny_tokenizer, hidden_size=32)
    shutil.copytree(Path(config.output_dir) / "adapter", tmp_path / "alone")
    settings = json.loads((tmp_path / "alone" / "adapter_config.json").read_text())
    settings["base_model_name_or_path"] = "gone/model"
    (tmp_path / "alone" / "adapter_config.json").write_text(json.dumps(settings))
    asked = config.model_copy(update={"model_name_or_path": str(other), "eval_generate_rows": 0})
    with pytest.raises(AdapterError, match=r"alone belongs to another base(.|\n)*gone/model(.|\n)*other"):
        compare(asked, ["base4", str(tmp_path / "alone")], progress="silent")


def test_a_run_is_computed_as_the_comparison_is_and_not_as_it_was_trained(config, comparison, tmp_path) -> None:
    shutil.copytree(config.output_dir, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoint-*"))
    settings = tmp_path / "run" / "config.yaml"
    settings.write_text(
        settings.read_text().replace("bnb_4bit_compute_dtype: float32", "bnb_4bit_compute_dtype: bfloat16")
    )
    asked = config.model_copy(update={"eval_generate_rows": 0})
    found = compare(asked, ["adapter", str(tmp_path / "run")], progress="silent")
    values = [cell.value for cell in found.cells["perplexity"].values()]
    assert values == [pytest.approx(figure(comparison, "perplexity", "adapter"), rel=1e-6)] * 2


def test_a_run_that_is_not_trained_has_no_adapter_and_a_stored_base_no_16_bits(config, tmp_path) -> None:
    untrained = config.model_copy(update={"output_dir": str(tmp_path / "none")})
    with pytest.raises(CheckpointError, match=r"adapter: there is no adapter in .*none"):
        compare(untrained, ["base4", "adapter"], progress="silent")
    pipeline.quantize_checkpoint(config, tmp_path / "nf4")
    stored = config.model_copy(update={"model_name_or_path": str(tmp_path / "nf4")})
    with pytest.raises(ConfigError, match=r"base16: the base of this run is stored quantized \(nf4\)"):
        compare(stored, ["base", "base16"], progress="silent")


def other_model(folder: Path, tokenizer, **keys: int) -> Path:
    """A random model of another shape."""
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(**(shape | keys), vocab_size=len(tokenizer) + 8)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_with_another_tokenizer_answers_compare_and_losses_are_left_out(config, tiny_tokenizer, tmp_path) -> None:
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.add_tokens(["euros"])
    other = other_model(tmp_path / "other", tokenizer)
    found = compare(config, ["base16", str(other)], progress="silent")
    assert list(found.cells["exact_match"]) == ["base16", str(other)]
    assert list(found.cells["perplexity"]) == list(found.cells["eval_loss"]) == ["base16"]
    assert found.models[1].left_out == dict.fromkeys(("loss", "perplexity"), "its tokenizer is not base16's")
    only = config.model_copy(update={"eval_generate_rows": 0})
    with pytest.raises(DataError, match=r"do not compare between tokenizers(.|\n)*other(.|\n)*eval_generate_rows"):
        compare(only, ["base16", str(other)], progress="silent")


@pytest.mark.parametrize(
    ("key", "content", "said"),
    [
        ("perplexity_text", None, r"no such file(.|\n)*perplexity_text"),
        ("perplexity_text", b"\n", "is empty"),
        ("perplexity_text", b"\xff\xfe", "is not UTF-8"),
        ("multiple_choice_dataset", None, "missing"),
        ("multiple_choice_dataset", b'{"question": "q", "choices": ["a"], "answer": 0}\n', "row 1: no choices"),
        ("eval_dataset", b"", "missing.jsonl"),
    ],
)
def test_data_that_is_missing_empty_or_faulty_is_told_before_a_model_is_loaded(
    config, tmp_path, monkeypatch, key, content, said
) -> None:
    monkeypatch.setattr("fourfold.variants.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    path = tmp_path / ("missing.jsonl" if key != "perplexity_text" else "missing.txt")
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=said):
        compare(config.model_copy(update={key: str(path)}), ["base4", "adapter"], progress="silent")


def test_nothing_to_measure_on_is_refused(config) -> None:
    nothing = {"eval_dataset": None, "perplexity_text": None, "eval_generate_rows": 0}
    with pytest.raises(ConfigError, match=r"nothing to evaluate on(.|\n)*harness_tasks"):
        compare(config.model_copy(update=nothing), ["base4", "adapter"], progress="silent")


def test_evaluate_gives_what_each_task_of_the_configuration_measures(config, tmp_path) -> None:
    pytest.importorskip("lm_eval")
    rows = Path(config.perplexity_text).with_name("choices.jsonl")
    task = {
        "task": "paid",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    }
    (tmp_path / "paid.yaml").write_text(json.dumps(task))
    asked = {
        "eval_metrics": ["rouge", "bleu"],
        "eval_pattern": r"\d+",
        "multiple_choice_dataset": str(rows),
        "multiple_choice_rows": 3,
        "harness_tasks": [str(tmp_path / "paid.yaml")],
    }
    found = pipeline.evaluate(config.model_copy(update=asked), progress="silent")
    assert list(found) == [
        *("eval_loss", "eval_num_tokens", "exact_match", "rouge1", "rouge2", "rougeL", "bleu", "exact_match_rows"),
        *("perplexity", "perplexity_num_tokens"),
        *("multiple_choice_acc", "multiple_choice_acc_norm", "multiple_choice_rows"),
        *("harness/paid/acc", "harness/paid/rows"),
    ]
    # The harness asks the same questions in the same way.
    whole = pipeline.evaluate(config.model_copy(update=asked | {"multiple_choice_rows": None}), progress="silent")
    assert whole["harness/paid/acc"] == whole["multiple_choice_acc"]
    with pytest.raises(ConfigError, match=r"not there(.|\n)*none\.yaml"):
        pipeline.train(
            config.model_copy(update={"harness_tasks": ["none.yaml"], "overwrite_output_dir": True}), "silent"
        )
