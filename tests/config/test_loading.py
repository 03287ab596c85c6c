from __future__ import annotations

import textwrap

import pytest

from fourfold.config import load_config
from fourfold.errors import ConfigError


@pytest.fixture
def write(tmp_path):
    def write_config(text: str):
        path = tmp_path / "run.yaml"
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return path

    return write_config


def faults_of(path, overrides=()) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, list(overrides))
    return str(caught.value)


def test_every_fault_is_reported_at_once_with_its_line(write):
    path = write(
        """\
        model_name_or_path: m
        lora_r: sixteen
        lerning_rate: 2.0e-4
        fsdp: full_shard
        max_steps: 5
        num_train_epochs: 3
        """
    )
    message = faults_of(path, ["--lora_dropout", "2"])
    assert message.startswith(f"5 faults in {path}")
    assert f'{path}:2  lora_r\n     found:   "sixteen" (text)\n     allowed: a whole number, at least 1' in message
    assert f"{path}:3  lerning_rate is no key\n     to do:   did you mean learning_rate?" in message
    assert f"{path}:4  fsdp is known, and not supported" in message
    assert f"found:   {path}:5  max_steps, {path}:6  num_train_epochs" in message
    assert "command line  lora_dropout\n     found:   2 (a whole number)" in message


def test_an_unreadable_file_is_the_only_fault():
    assert faults_of("none.yaml", ["--lora_r", "x"]).startswith("1 fault in none.yaml")


def test_a_missing_model_is_named(write):
    assert "model_name_or_path is missing" in faults_of(write("lora_r: 8\n"))
    assert "model_name_or_path is missing" in faults_of(write(""))
    assert "model_name_or_path is missing" in faults_of(None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "seed: 1\nmodel_name_or_path: m\nseed: 2\n",
            ":3  seed is given twice\n     found:   the first on line 1",
        ),
        ("model_name_or_path: m\ncolumns:\n  a: b\n  a: c\n", ":4  a is given twice"),
        ("model_name_or_path: [m\n", "not valid YAML"),
        ("model_name_or_path: m\n\tlora_r: 8\n", ":2:1  not valid YAML"),
        ("- a\n- b\n", "is no mapping"),
        ("model_name_or_path: m\nseed: !!python/object/apply:os.getpid []\n", ":2:7  not valid YAML"),
        ("model_name_or_path: \x07\n", "not valid YAML"),
        ("model_name_or_path: m\nmodules_to_save: &a [*a]\n", "recursive"),
        ("model_name_or_path: m\n1: 2\n", ":2  1 is no key"),
    ],
)
def test_a_broken_file_is_refused_with_its_place(write, text, words):
    assert words in faults_of(write(text))


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    assert f"{tmp_path / 'none.yaml'} does not exist" in faults_of(tmp_path / "none.yaml")
    assert f"{tmp_path / 'config.yaml'} does not exist" in faults_of(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"pad_token: \xe9\n")
    assert "is not UTF-8 text" in faults_of(tmp_path / "latin.yaml")


def test_numbers_in_scientific_notation_need_no_dot(write):
    config = load_config(write("model_name_or_path: m\nlearning_rate: 2e-4\n"), ["--weight_decay", "1e-2"])
    assert config.learning_rate == 2e-4
    assert config.weight_decay == 1e-2


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--lora_r", "8"], "lora_r", 8),
        (["--lora_r=8"], "lora_r", 8),
        (["--lora-r", "8"], "lora_r", 8),
        (["--lora_rank", "8"], "lora_r", 8),
        (["--packing"], "packing", True),
        (["--packing", "--seed", "1"], "packing", True),
        (["--no-packing"], "packing", False),
        (["--no-sample-packing"], "packing", False),
        (["--packing", "false"], "packing", False),
        (["--target_modules", "[q_proj, v_proj]"], "target_modules", ["q_proj", "v_proj"]),
        (["--target_modules", "all-linear"], "target_modules", "all-linear"),
        (["--columns", "{prompt: question}"], "columns", {"prompt": "question"}),
        (["--output_dir", "2024"], "output_dir", "2024"),
        (["--model_revision", "1e5"], "model_revision", "1e5"),
        (["--output_dir", "a: b # c"], "output_dir", "a: b # c"),
        (["--chat_template", "{{ messages }}"], "chat_template", "{{ messages }}"),
        (["--model_revision", "null"], "model_revision", None),
        (["--report_to", "wandb"], "report_to", ["wandb"]),
        (["--report_to", "none"], "report_to", []),
        (["--resume_from_checkpoint"], "resume_from_checkpoint", "auto"),
    ],
)
def test_overrides_win_over_the_file(write, words, key, value):
    path = write("model_name_or_path: m\nlora_r: 64\npacking: true\ntarget_modules: [o_proj]\n")
    assert getattr(load_config(path, words), key) == value


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["stray"], "command line  stray belongs to no key"),
        (["-3"], "command line  -3 belongs to no key"),
        (["--lora_r"], "command line  lora_r\n     found:   true"),
        (["--lora_r", "[1"], "command line  lora_r is not valid YAML"),
        (["--lora_r", "8", "--lora_rank", "9"], "are one key with two values"),
        (["--packin", "true"], "did you mean packing?"),
        (["--no-packin"], "did you mean packing?"),
        (["--lora_r", "-3"], "found:   -3 (a whole number)"),
    ],
)
def test_faults_of_the_command_line_are_named(words, message):
    assert message in faults_of(None, ["--model_name_or_path", "m", *words])


def test_an_override_displaces_the_other_way_to_say_it(write):
    path = write("model_name_or_path: m\nnum_train_epochs: 3\nwarmup_ratio: 0.1\n")
    config = load_config(path, ["--max_steps", "5", "--warmup_steps", "2"])
    assert (config.max_steps, config.num_train_epochs) == (5, None)
    assert (config.warmup_steps, config.warmup_ratio) == (2, None)
    assert load_config(path, ["--max_steps", "null"]).num_train_epochs == 3
    assert "both say how long to train" in faults_of(path, ["--max_steps", "5", "--num_train_epochs", "2"])
