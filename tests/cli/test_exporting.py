from __future__ import annotations

import json
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fourfold
from fourfold.cli import app
from fourfold.errors import VerificationError


@dataclass
class Report:
    folder: Path


@pytest.fixture
def exporting(monkeypatch):
    """An `exporting` that notes its calls and writes nothing."""
    module = types.ModuleType("fourfold.exporting")
    module.calls = []

    def export(*args, **kwargs):
        module.calls.append((args, kwargs))
        sys.stdout.write("chatter of a library\n")
        if kwargs["bound_kl"] == 0:
            raise VerificationError("too far")
        return Report(Path("out"))

    module.export = export
    monkeypatch.setitem(sys.modules, "fourfold.exporting", module)
    monkeypatch.setattr(fourfold, "exporting", module, raising=False)
    return module


def invoke(*words: str):
    return CliRunner().invoke(app, ["export", *words])


def test_export_hands_on_its_words_and_prints_json_alone(exporting) -> None:
    result = invoke("runs/a", "out", "--format", "gguf", "--quantization", "Q4_0", "--bound-kl", "0.3", "--json")
    assert result.exit_code == 0
    assert exporting.calls == [(("runs/a", Path("out"), "gguf", "Q4_0"), {"bound_kl": 0.3, "bound_top1": None})]
    assert json.loads(result.stdout) == {"folder": "out"}


def test_past_a_bound_the_command_fails(exporting) -> None:
    result = invoke("runs/a", "out", "--format", "adapter", "--bound-kl", "0")
    assert result.exit_code == 1


def test_a_format_is_asked_for_and_must_be_known(exporting) -> None:
    assert invoke("runs/a", "out").exit_code == 2
    assert invoke("runs/a", "out", "--format", "onnx").exit_code == 2
    assert exporting.calls == []
