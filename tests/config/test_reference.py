from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fourfold.config import RunConfig
from fourfold.config.reference import allowed_values, is_text

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_is_what_the_command_prints():
    command = [sys.executable, "-m", "fourfold.config"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert PAGE.read_text(encoding="utf-8") == printed, "run `python -m fourfold.config > docs/configuration.md`"


def test_the_page_describes_every_key():
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"| `{key}` |" in page for key in RunConfig.model_fields)


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("lora_r", "a whole number, at least 1"),
        ("learning_rate", "a number, above 0"),
        ("packing", "true or false"),
        ("adapter", "lora or null"),
        ("bnb_4bit_quant_type", "nf4, fp4, int4 or int8"),
        ("device", "auto, cpu or cuda or cuda:N (N a number)"),
        ("report_to", "a list of tensorboard, wandb, trackio, mlflow"),
        ("target_modules", "text, a list of texts or null"),
        ("columns", "a mapping of text to text"),
        ("output_dir", "text, not empty"),
    ],
)
def test_allowed_values_are_said_in_words(key, words):
    assert allowed_values(key) == words


def test_every_key_says_what_it_allows():
    assert all(allowed_values(key) for key in RunConfig.model_fields)


def test_keys_of_text_alone_are_told_apart():
    assert is_text("output_dir")
    assert is_text("model_revision")
    assert not is_text("target_modules")
    assert not is_text("lora_r")
    assert not is_text("init_lora_weights")
