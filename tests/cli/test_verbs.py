from __future__ import annotations

import json
import subprocess
import sys
import types
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fourfold
from fourfold.cli import app
from fourfold.errors import DataError, VerificationError

MAIN = "from fourfold.cli import main; main()"


def in_own_process(*words: str, **options) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", MAIN, *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


@dataclass
class Run:
    output_dir: Path
    metrics: dict[str, object]


@dataclass
class MergeReport:
    out: Path
    relative_error: float
    peak_memory_bytes: int


class Inspection:
    def to_dict(self) -> dict[str, object]:
        return {"layers": [{"name": "q_proj", "snr_db": float("inf")}]}

    def lines(self) -> Iterator[str]:
        yield "q_proj  18.9 dB"
        yield "[bold] is no markup"


class Session:
    figures = None

    def lines(self) -> list[str]:
        return ["memory for 1 sequence"]

    def reply(self, messages: list[dict[str, str]]) -> Iterator[str]:
        yield f"{len(messages)} turns, "
        yield f"last: {messages[-1]['content']}"


@pytest.fixture
def pipeline(monkeypatch):
    """A pipeline that notes its calls and trains nothing."""
    module = types.ModuleType("fourfold.pipeline")
    module.calls = []

    def note(name, result):
        def call(*args, **kwargs):
            module.calls.append((name, args, kwargs))
            sys.stdout.write("chatter of a library\n")
            return result

        setattr(module, name, call)

    note("train", Run(Path("runs/a"), {"train_loss": 0.5}))
    note("evaluate", {"exact_match": 0.875, "perplexity": float("nan")})
    note("quantize_checkpoint", {"out": Path("q"), "bits_per_weight": 4.127})
    note("inspect", Inspection())
    note("merge", MergeReport(Path("m"), 1e-3, 3 * 2**20))
    note("chat", Session())
    monkeypatch.setitem(sys.modules, "fourfold.pipeline", module)
    monkeypatch.setattr(fourfold, "pipeline", module, raising=False)
    return module


@pytest.fixture
def config_file(tmp_path) -> str:
    path = tmp_path / "run.yaml"
    path.write_text("model_name_or_path: m\nlora_r: 8\n", encoding="utf-8")
    return str(path)


def invoke(*words: str, stdin: str | None = None):
    return CliRunner().invoke(app, list(words), input=stdin)


def test_importing_the_command_imports_no_torch():
    code = "import fourfold.cli, sys; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


def test_every_verb_has_a_help_page():
    listed = in_own_process("--help")
    assert listed.returncode == 0
    for verb in ("train", "evaluate", "quantize", "merge", "export", "chat", "bench", "env"):
        assert verb in listed.stdout
        page = invoke(verb, "--help")
        assert page.exit_code == 0
        assert "--json" in page.stdout


def test_train_gets_the_file_with_overrides_in_any_order(pipeline, config_file):
    result = invoke("train", config_file, "--learning_rate", "1e-3", "--json", "--no-packing", "--seed=3")
    assert result.exit_code == 0
    ((name, (config,), options),) = pipeline.calls
    assert name == "train"
    assert (config.lora_r, config.learning_rate, config.packing, config.seed) == (8, 1e-3, False, 3)
    assert options == {"progress": "json"}
    assert json.loads(result.stdout.splitlines()[-1]) == {
        "event": "result",
        "output_dir": "runs/a",
        "metrics": {"train_loss": 0.5},
    }


def test_train_needs_no_file_when_the_keys_say_all(pipeline):
    result = invoke("train", "--model_name_or_path", "n", "--lora_r", "4")
    assert result.exit_code == 0
    config = pipeline.calls[0][1][0]
    assert (config.model_name_or_path, config.lora_r) == ("n", 4)
    assert pipeline.calls[0][2] == {"progress": "plain"}
    assert "fourfold chat runs/a" in result.stdout


def test_configuration_faults_leave_with_2_and_nothing_on_stdout(config_file):
    result = in_own_process("train", config_file, "--lorra_r", "8")
    assert result.returncode == 2
    assert result.stdout == ""
    assert "did you mean lora_r?" in result.stderr
    assert "Traceback" not in result.stderr


def test_faults_are_json_for_machines(config_file):
    result = in_own_process("evaluate", config_file, "--lorra_r", "8", "--json")
    assert result.returncode == 2
    error = json.loads(result.stdout)["error"]
    assert error["type"] == "ConfigError"
    assert "did you mean lora_r?" in error["message"]


@pytest.mark.parametrize(
    "error", [DataError("row 3 of a.jsonl has no [messages]"), VerificationError("not what was trained")]
)
def test_other_errors_leave_with_1_and_their_message(pipeline, config_file, error, monkeypatch):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(pipeline, "train", fail)
    result = invoke("train", config_file)
    assert result.exit_code == 1
    assert f"{type(error).__name__}: {error}" in result.stderr
    assert "Traceback" not in result.stderr


def test_an_interrupt_leaves_with_130_and_one_line(pipeline, config_file, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "train", interrupt)
    result = invoke("train", config_file)
    assert result.exit_code == 130
    assert result.stderr.strip() == "Interrupted."


def test_a_fault_of_ours_keeps_its_traceback(pipeline, config_file, monkeypatch):
    def fail(*args, **kwargs):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(pipeline, "train", fail)
    result = invoke("train", config_file)
    assert isinstance(result.exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["evaluate", "CONFIG"], {"exact_match": 0.875, "perplexity": None}),
        (["quantize", "m", "q"], {"out": "q", "bits_per_weight": 4.127}),
        (["quantize", "m", "--inspect"], {"layers": [{"name": "q_proj", "snr_db": None}]}),
        (["merge", "a", "m"], {"out": "m", "relative_error": 1e-3, "peak_memory_bytes": 3 * 2**20}),
        (["chat", "m", "--prompt", "hi"], {"prompt": "hi", "reply": "1 turns, last: hi"}),
    ],
)
def test_with_json_stdout_holds_one_json_value_and_nothing_else(pipeline, config_file, words, expected):
    words = [config_file if word == "CONFIG" else word for word in words]
    result = invoke(*words, "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout) == expected
    assert "chatter of a library" in result.stderr


def test_evaluate_prints_its_results_as_a_table(pipeline, config_file):
    result = invoke("evaluate", config_file)
    assert "exact_match" in result.stdout
    assert "0.875" in result.stdout


def test_quantize_takes_the_keys_of_the_configuration(pipeline):
    result = invoke("quantize", "m", "q", "--bnb_4bit_quant_type", "fp4", "--quantize_lm_head", "--inspect")
    assert result.exit_code == 0, result.stderr
    (inspected, (config,), _), (written, (same_config, out), _) = pipeline.calls
    assert (inspected, written) == ("inspect", "quantize_checkpoint")
    assert config == same_config
    assert (config.model_name_or_path, config.bnb_4bit_quant_type) == ("m", "fp4")
    assert config.quantize_lm_head
    assert out == Path("q")
    assert "[bold] is no markup" in result.stdout


def test_inspect_needs_no_folder_even_with_keys_behind_it(pipeline):
    result = invoke("quantize", "m", "--inspect", "--bnb_4bit_blocksize", "128")
    assert result.exit_code == 0, result.stderr
    ((name, (config,), _),) = pipeline.calls
    assert (name, config.bnb_4bit_blocksize) == ("inspect", 128)


def test_quantize_without_a_folder_is_refused(pipeline):
    result = invoke("quantize", "m")
    assert result.exit_code == 2
    assert "give a folder to write to" in result.stderr
    assert not pipeline.calls


def test_merge_goes_onto_the_trained_weights_unless_told_otherwise(pipeline):
    assert invoke("merge", "a", "out").exit_code == 0
    assert invoke("merge", "a", "out", "--onto", "original", "--bound", "0.5").exit_code == 0
    assert [call[2] for call in pipeline.calls] == [
        {"onto": "dequantized", "bound": None},
        {"onto": "original", "bound": 0.5},
    ]
    assert invoke("merge", "a", "out", "--onto", "elsewhere").exit_code == 2


def test_chat_answers_a_prompt_from_the_standard_input(pipeline):
    result = invoke("chat", "m", "--system", "Be brief.", "--prompt", "-", stdin="hello\n")
    assert result.exit_code == 0
    assert "2 turns, last: hello" in result.stdout
    assert pipeline.calls[0][2] == {"max_new_tokens": 512, "temperature": 0.0, "top_p": 1.0, "seed": 0}


def test_chat_remembers_the_conversation_until_reset(pipeline):
    result = invoke("chat", "m", stdin="one\n\ntwo\n/reset\nthree\n/exit\n")
    assert result.exit_code == 0
    for line in ("1 turns, last: one", "3 turns, last: two", "1 turns, last: three"):
        assert line in result.stdout


def test_chat_forgets_a_turn_that_was_stopped(pipeline, monkeypatch):
    class Stoppable(Session):
        def reply(self, messages):
            if messages[-1]["content"] == "stop":
                yield "half an ans"
                raise KeyboardInterrupt
            yield from super().reply(messages)

    monkeypatch.setattr(pipeline, "chat", lambda *args, **kwargs: Stoppable())
    result = invoke("chat", "m", stdin="stop\ngo on\n")
    assert result.exit_code == 0
    assert "(stopped)" in result.stdout
    assert "1 turns, last: go on" in result.stdout


def test_chat_for_machines_needs_a_prompt(pipeline):
    result = invoke("chat", "m", "--json")
    assert result.exit_code == 2
    assert not pipeline.calls


def test_env_prints_json_alone_on_stdout():
    result = in_own_process("env", "--json")
    assert result.returncode == 0
    environment = json.loads(result.stdout)
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment["memory_bytes"] > 2**28
