"""What each key takes, in words, from RunConfig's own schema: for error messages and the reference page."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import yaml

from fourfold.config.aliases import ALIASES
from fourfold.config.run import GROUPS, RunConfig

__all__ = ["allowed_values", "is_text", "reference_page"]


@cache
def _schemas() -> dict[str, dict[str, Any]]:
    properties: dict[str, dict[str, Any]] = RunConfig.model_json_schema()["properties"]
    return properties


def allowed_values(key: str) -> str:
    """The values that `key` takes, in words: "a whole number, at least 1"."""
    *most, last = _alternatives(_schemas()[key])
    return f"{', '.join(most)} or {last}" if most else last


def is_text(key: str) -> bool:
    """Whether `key` takes text alone (or null), so that 2024 on the command line is a folder's name."""
    schema = _schemas()[key]
    return all(part.get("type") in ("string", "null") for part in schema.get("anyOf", [schema]))


def _alternatives(schema: dict[str, Any]) -> Iterator[str]:
    if "anyOf" in schema:
        for part in schema["anyOf"]:
            yield from [part["description"]] if "description" in part else _alternatives(part)
    elif "enum" in schema or "const" in schema:
        yield from (_as_yaml(value) for value in schema.get("enum", [schema.get("const")]))
    elif schema["type"] == "array":
        yield f"a list of {_plural(schema['items'])}"
    elif schema["type"] == "object":
        yield "a mapping of text to text"
    else:
        yield ", ".join([_TYPE_NAMES[schema["type"]], *_bounds(schema)])


_TYPE_NAMES = {
    "boolean": "true or false",
    "integer": "a whole number",
    "number": "a number",
    "string": "text",
    "null": "null",
}


def _plural(items: dict[str, Any]) -> str:
    return "texts" if items == {"type": "string"} else ", ".join(_alternatives(items))


def _bounds(schema: dict[str, Any]) -> Iterator[str]:
    for name, words in {
        "minimum": "at least",
        "exclusiveMinimum": "above",
        "maximum": "at most",
        "exclusiveMaximum": "below",
    }.items():
        if name in schema:
            yield f"{words} {schema[name]:g}"
    if schema.get("minLength") == 1:
        yield "not empty"


def _as_yaml(value: object) -> str:
    text: str = yaml.safe_dump(value, default_flow_style=True, width=1000)
    return text.removesuffix("\n").removesuffix("\n...")


def reference_page() -> str:
    """The reference of all keys and aliases, in Markdown; `python -m fourfold.config` prints it."""
    lines = [
        "<!-- Written by `python -m fourfold.config > docs/configuration.md` from RunConfig. -->",
        "# Configuration",
        "",
        "A run is described by one YAML file. Each key can be given on the command line as well, where it",
        "wins over the file: `--key value`, `--key=value`, `--flag` for true, `--no-flag` for false; the",
        "value is read as YAML. Paths are relative to the folder where the command runs. A key that does not",
        "exist, a wrong type or a contradiction is refused, all faults together, with file and line.",
    ]
    for key, field in RunConfig.model_fields.items():
        if key in GROUPS:
            lines += [
                "",
                f"## {GROUPS[key]}",
                "",
                "| key | default | takes | what it is |",
                "|---|---|---|---|",
            ]
        if field.is_required():
            default = "required"
        elif field.default_factory is not None:
            default = "see there"
        else:
            default = f"`{_as_yaml(field.default)}`"
        allowed = allowed_values(key).replace("|", "\\|")
        lines.append(f"| `{key}` | {default} | {allowed} | {field.description} |")
    lines += [
        "",
        "## Names of other systems",
        "",
        "Keys of Axolotl, LLaMA-Factory, TRL and the Transformers Trainer that are accepted for ours:",
        "",
        ", ".join(f"`{alias}`" for alias in sorted(ALIASES)) + ".",
        "",
        "Their other keys are refused by name, with what to do instead, unless their value switches them off",
        "(null, false or empty). A key that is absent has the default of the tables above, not theirs.",
    ]
    return "\n".join(lines) + "\n"
