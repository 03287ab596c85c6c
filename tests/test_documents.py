"""The documents say what the code does."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path

import pytest
import yaml

from fourfold.cli import app
from fourfold.config import RunConfig, load_config

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
VERBS = {command.name or command.callback.__name__ for command in app.registered_commands}


def blocks(language: str) -> list[tuple[str, str]]:
    """(document, block) of every fenced block of a language."""
    return [
        (path.name, block)
        for path in DOCUMENTS
        for block in re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)
    ]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize(("document", "block"), blocks("yaml"))
def test_yaml_blocks_are_configurations(document: str, block: str, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(block)
    assert load_config(str(file), []).model_name_or_path == yaml.safe_load(block)["model_name_or_path"]


@pytest.mark.parametrize(("document", "block"), blocks("python"))
def test_python_blocks_compile(document: str, block: str) -> None:
    ast.parse(block)


def test_commands_name_verbs_and_keys_that_exist() -> None:
    options = {"--prompt", "--system", "--inspect", "--json", "--onto", "--bound", "--picture", "--verbose"}
    keys = {f"--{key}" for key in RunConfig.model_fields}
    commands = [
        shlex.split(line, comments=True)
        for _, block in blocks("sh")
        for line in block.splitlines()
        if "fourfold " in line
    ]
    assert commands
    for words in commands:
        assert words[1] in VERBS, words
        assert {word for word in words if word.startswith("--")} <= options | keys, words
