from __future__ import annotations

import copy
import re

import pytest

from fourfold.export.modelfile import modelfile

DEFAULT = "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"


def rendered(text: str, messages: list[dict[str, str]]) -> str:
    """What Ollama makes of the template: a range over the messages, with a branch a role."""
    template = re.search(r'TEMPLATE """(.*?)"""', text, re.S)[1]
    system = re.search(r'SYSTEM """(.*?)"""', text, re.S)
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system[1]}, *messages]
    body, opening = re.fullmatch(r"\{\{ range \.Messages \}\}(.*)\{\{ end \}\}(.*)", template, re.S).groups()
    branches = dict(re.findall(r'if eq \.Role "(\w+)" \}\}(.*?)\{\{ (?=else|end)', body, re.S))
    turns = (branches[turn["role"]].replace("{{ .Content }}", turn["content"]) for turn in messages)
    return "".join(turns) + opening


@pytest.fixture
def tokenizer(tiny_tokenizer):
    return copy.deepcopy(tiny_tokenizer)


@pytest.mark.parametrize("default", ["", DEFAULT])
def test_the_template_writes_what_the_chat_template_does(tokenizer, default) -> None:
    tokenizer.chat_template = default + tokenizer.chat_template
    text = modelfile(tokenizer, [tokenizer.eos_token_id], "model.gguf")
    assert text.startswith("FROM ./model.gguf\n")
    assert text.endswith('PARAMETER stop "<|im_end|>"\n')
    assert ("SYSTEM" in text) == bool(default)
    turns = [{"role": role, "content": f"{role}'s"} for role in ("system", "user", "assistant", "user")]
    for messages in (turns, turns[1:], turns[1:2]):
        wanted = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert rendered(text, messages) == wanted


def test_a_template_that_is_more_than_turns_is_left_to_ollama(tokenizer) -> None:
    tokenizer.chat_template = "{% for m in messages %}{{ loop.index }}{{ m['content'] }}{% endfor %}"
    text = modelfile(tokenizer, [2], "model.gguf")
    assert "TEMPLATE" not in text
    assert "# The chat template has no counterpart" in text
    tokenizer.chat_template = None
    assert modelfile(tokenizer, [2], "model.gguf") == 'FROM ./model.gguf\nPARAMETER stop "<|im_end|>"\n'
