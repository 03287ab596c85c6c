"""`fourfold serve` as a process: what it says, how it ends, and its keys."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from fourfold.cli import app

MAIN = "import torch; torch.set_num_threads(1); from fourfold.cli import main; main()"
SECRET = "very-secret-key"


@contextmanager
def served(*words: str, **environment: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and the first line that it prints."""
    command = [sys.executable, "-c", MAIN, "serve", *words, "--port", "0", "--max-length", "64"]
    environment = {**os.environ, **environment}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        yield process, process.stdout.readline()
        if process.poll() is None:
            process.kill()


def ask(url: str, path: str, body: Any = None, key: str | None = None) -> Any:
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    request = urllib.request.Request(url + path, json.dumps(body).encode() if body else None, headers)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=30) as response:
        return json.load(response)


def test_a_server_says_where_it_is_answers_those_with_a_key_and_ends_when_told(tiny_llama: Path) -> None:
    with served(str(tiny_llama), "--name", "tiny", "--json", FOURFOLD_API_KEY=f"other, {SECRET}") as (process, line):
        said = json.loads(line)
        assert said["event"] == "listening"
        assert said["models"] == ["tiny"]
        with pytest.raises(urllib.error.HTTPError, match="401"):
            ask(said["url"], "/v1/models")
        body = {"model": "tiny", "prompt": "Paid", "max_tokens": 4}
        assert ask(said["url"], "/v1/completions", body, SECRET)["usage"]["completion_tokens"] <= 4
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGTERM
    assert (out, err) == ("", "")
    assert SECRET not in line


def invoke(*words: object) -> Any:
    return CliRunner().invoke(app, ["serve", *map(str, words)])


def test_bad_words_are_refused_before_a_model_is_loaded(tiny_llama: Path, tmp_path: Path) -> None:
    for words, said in (
        (("--adapter", "name"), "NAME=FOLDER"),
        (("--api-key-file", tmp_path / "none"), "cannot be read"),
        (("--host", "192.0.2.1"), "cannot listen"),
    ):
        result = invoke(tiny_llama, *words)
        assert result.exit_code == 2, result.output
        assert said in result.stderr
    empty = tmp_path / "keys"
    empty.write_text("\n\n")
    assert "no API key" in invoke(tiny_llama, "--api-key-file", empty).stderr
    assert invoke(tiny_llama, "--port", "70000").exit_code == 2


def test_whoever_opens_a_server_without_a_key_is_warned(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FOURFOLD_API_KEY", raising=False)
    monkeypatch.setattr("fourfold.hosting.host", lambda *_: None)
    assert "asks for no key" in invoke(tiny_llama, "--host", "0.0.0.0").stderr
    assert "asks for no key" not in invoke(tiny_llama).stderr
    monkeypatch.setenv("FOURFOLD_API_KEY", SECRET)
    assert invoke(tiny_llama, "--host", "0.0.0.0").stderr == ""


@pytest.mark.parametrize(("keys", "reuses"), [("", True), ("one", True), ("one,two", False)])
def test_what_is_cached_is_shared_by_one_user_alone(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, keys: str, reuses: bool
) -> None:
    seen = []
    monkeypatch.setenv("FOURFOLD_API_KEY", keys)
    monkeypatch.setattr("fourfold.hosting.host", lambda _hosted, engine, *_: seen.append(engine.reuse_prefixes))
    assert invoke(tiny_llama).exit_code == 0
    assert seen == [reuses]


def test_the_command_for_vllm_is_all_that_is_printed(tiny_llama: Path, tmp_path: Path) -> None:
    result = invoke(tiny_llama, "--print-vllm", tmp_path / "out")
    assert result.exit_code == 0
    assert result.stdout.startswith(f"vllm serve {tiny_llama} ")
    assert json.loads(invoke(tiny_llama, "--print-vllm", tmp_path / "out", "--json").stdout)["vllm"] == (
        result.stdout.strip()
    )
