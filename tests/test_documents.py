"""The documents say what the code does."""

from __future__ import annotations

import ast
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer
import yaml

from fourfold.cli import app
from fourfold.config import load_config
from fourfold.errors import ConfigError

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
VERBS = typer.main.get_command(app).commands
# What a fault in a configuration is reported as; a command under which it stands is meant to be refused.
REFUSED = re.compile(r"^ConfigError: \d+ faults? in ", re.M)


@dataclass(frozen=True)
class Block:
    """A fenced block of a document."""

    document: str
    text: str


def blocks(language: str) -> list[Block]:
    return [
        Block(path.name, text)
        for path in DOCUMENTS
        for text in re.findall(rf"^```{language}\n(.*?)^```", path.read_text(encoding="utf-8"), re.M | re.S)
    ]


def commands() -> list[tuple[str, list[str], bool]]:
    """(document, words, whether it is shown to be refused) of every shown command: in sh blocks each line, in console
    blocks those after a prompt."""
    found = []
    for language, start in (("sh", ""), ("console", r"\$ ")):
        for block in blocks(language):
            lines = block.text.replace("\\\n", " ")
            for line in re.findall(rf"^{start}(.+)$", lines, re.M):
                words = shlex.split(line, comments=True)
                found.append((block.document, words, bool(REFUSED.search(block.text))))
    return found


COMMANDS = commands()
OURS = [command for command in COMMANDS if Path(command[1][0]).name == "fourfold"]


def named(value: object) -> str | None:
    return value.document if isinstance(value, Block) else None


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


def test_the_readme_leads_to_every_document() -> None:
    links = set(re.findall(r"\]\(docs/([^)#]+\.md)", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert links == {path.name for path in (ROOT / "docs").glob("*.md")}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_no_path_of_one_machine(path: Path) -> None:
    text = re.sub(r"\w+://\S+", "", path.read_text(encoding="utf-8"))
    assert re.findall(r"(?<![\w./\]})*~])/\w[\w.-]*/\S*", text) == []


@pytest.mark.parametrize("block", blocks("yaml"), ids=named)
def test_yaml_blocks_are_configurations(block: Block, tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(block.text)
    assert load_config(file).model_name_or_path == yaml.safe_load(block.text)["model_name_or_path"]


@pytest.mark.parametrize("block", blocks("python"), ids=named)
def test_python_blocks_compile(block: Block) -> None:
    ast.parse(block.text)


@pytest.mark.parametrize(("document", "words", "is_refused"), OURS, ids=lambda value: str(value)[:60])
def test_commands_are_understood(document: str, words: list[str], is_refused: bool, tmp_path: Path) -> None:
    verb = VERBS[words[1]]
    # Parses the verb's own options; what is left over are keys of the configuration.
    context = verb.make_context(words[1], words[2:])
    # Without CONFIG or OUT, the first key stands in its place.
    leading = [value for name in ("config", "out") if (value := context.params.get(name) or "").startswith("--")]
    overrides = [*leading, *context.args]
    if not verb.context_settings.get("ignore_unknown_options"):
        assert overrides == []
        return
    base = tmp_path / "run.yaml"
    base.write_text("{model_name_or_path: MODEL, train_dataset: train.jsonl, eval_dataset: held_out.jsonl}\n")
    if is_refused:
        with pytest.raises(ConfigError):
            load_config(base, overrides)
    else:
        load_config(base, overrides)


def test_every_verb_is_shown() -> None:
    assert {words[1] for _, words, _ in OURS} == set(VERBS)


def test_make_targets_and_scripts_in_commands_exist() -> None:
    targets = set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for document, words, _ in COMMANDS:
        if words[0] == "make":
            assert {word for word in words[1:] if "=" not in word} <= targets, (document, words)
        for word in words:
            if word.startswith(("examples/", "benchmarks/")):
                assert (ROOT / word).exists(), (document, words)


def test_every_dependency_has_its_reason() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    groups = [project["project"]["dependencies"], *project["dependency-groups"].values()]
    text = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
    named_there = set(re.findall(r"[\w-]+", text))
    assert {re.match(r"[\w-]+", requirement)[0] for group in groups for requirement in group} <= named_there
