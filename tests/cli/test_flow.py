"""The verbs over a real, tiny model: what a person and a machine see, and with which code a command ends."""

from __future__ import annotations

import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import transformers
from typer.testing import CliRunner, Result

from fourfold.cli import app, terminal
from fourfold.config import RunConfig

MAIN = "import torch; torch.set_num_threads(1); from fourfold.cli import main; main()"
NOISE = re.compile(r"Warning|it/s\]|examples/s|kernels-community|Traceback|Failed to load")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def config(tiny_run, tmp_path_factory) -> RunConfig:
    """A run that `test_the_verbs_in_a_row` trains first."""
    made: RunConfig = tiny_run(tmp_path_factory.mktemp("flow"), eval_generate_rows=2, eval_max_new_tokens=4)
    return made


def invoke(*words: object) -> Result:
    return CliRunner().invoke(app, [str(word) for word in words])


def write_config(config: RunConfig) -> Path:
    path = Path(config.output_dir).parent / "run.yaml"
    path.write_text(config.to_yaml())
    return path


def result_of(*words: object) -> dict[str, object]:
    """The one JSON value that a verb prints."""
    result = invoke(*words, "--json")
    assert result.exit_code == 0, result.stderr
    value: dict[str, object] = json.loads(result.stdout)
    return value


def test_the_verbs_in_a_row_speak_json_to_machines(config, tmp_path) -> None:
    base = tmp_path / "base"
    checkpoint = result_of("quantize", config.model_name_or_path, base, "--device", "cpu")
    assert checkpoint["formats"] == ["nf4"]
    trained = invoke("train", write_config(config), "--json", f"--model_name_or_path={base}")
    assert trained.exit_code == 0, trained.stderr
    events = [json.loads(line) for line in trained.stdout.splitlines()]
    assert {event["event"] for event in events} == {"data", "model", "log", "save", "result"}
    assert events[-1]["output_dir"] == config.output_dir
    measured = result_of("evaluate", config.output_dir)
    assert measured["eval_loss"] == pytest.approx(events[-1]["metrics"]["eval_loss"], rel=1e-5)
    merged = tmp_path / "merged"
    report = result_of("merge", config.output_dir, merged)
    assert report["difference"]["relative_error"] < report["bound"]  # type: ignore[index]
    answers = [
        result_of("chat", folder, "--prompt", "Anna paid 6 euros.", "--max-new-tokens", "5")
        for folder in (config.output_dir, merged)
    ]
    assert [answer["prompt"] for answer in answers] == ["Anna paid 6 euros."] * 2
    assert all(answer["reply"] for answer in answers)


def test_a_command_that_fails_says_why_and_nothing_else(config, tmp_path) -> None:
    words = ["train", str(write_config(config)), "--output_dir", str(tmp_path / "r"), "--target_modules", "[w_proj]"]
    failed = subprocess.run([sys.executable, "-c", MAIN, *words], capture_output=True, text=True, check=False)
    assert failed.returncode == 1
    assert failed.stderr.startswith("AdapterError: ")
    assert "w_proj" in failed.stderr
    assert not NOISE.search(failed.stderr + failed.stdout), failed.stderr


def test_libraries_keep_silent_while_a_run_is_trained_and_used(tiny_run, tmp_path) -> None:
    path = write_config(tiny_run(tmp_path, eval_generate_rows=2, eval_max_new_tokens=2))
    run, merged = tmp_path / "run", tmp_path / "merged"
    for words in (["train", path], ["merge", run, merged], ["chat", merged, "--prompt", "Hello"]):
        done = subprocess.run(
            [sys.executable, "-c", MAIN, *map(str, words), *(["--max-new-tokens", "3"] if words[0] == "chat" else [])],
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stderr == "", words
        assert not NOISE.search(done.stdout), done.stdout


def test_an_interrupt_leaves_a_checkpoint_and_the_command_that_goes_on(tiny_run, tmp_path) -> None:
    path = write_config(tiny_run(tmp_path, max_steps=400, save_steps=400, eval_dataset=None, logging_steps=1))
    words = [sys.executable, "-c", MAIN, "train", str(path), "--overwrite_output_dir"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 90
        while not (metrics.exists() and metrics.read_text()):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.stderr and process.stderr.read()
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "nothing is lost" in said
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*")
    step = int(checkpoint.name.removeprefix("checkpoint-"))
    hint = re.search(r"`fourfold (train .*)`", said)
    assert hint is not None
    resumed = invoke(*shlex.split(hint[1]), "--json", "--max_steps", step + 1)
    assert resumed.exit_code == 0, resumed.stderr
    logs = [json.loads(line) for line in resumed.stdout.splitlines() if '"log"' in line]
    assert [log["step"] for log in logs if "loss" in log] == [step + 1]


def test_progress_bars_and_messages_of_libraries_are_off(monkeypatch) -> None:
    terminal.quiet_libraries(verbose=False)
    assert transformers.logging.get_verbosity() == transformers.logging.ERROR
    assert not transformers.logging.is_progress_bar_enabled()
