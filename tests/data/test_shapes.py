"""One rendering of a conversation tells what rendering each of its beginnings tells."""

from __future__ import annotations

import random
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import trl

from fourfold.data.shapes import Shapes
from fourfold.data.templates import Encoded, encode_conversations
from fourfold.data.turns import Message
from fourfold.errors import DataError

TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"
TAIL = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TEMPLATES = {
    "trimmed, with folded system turn": (
        "{% for m in messages %}{% if m['role'] == 'system' %}<<SYS>>{{ m['content'] }}<</SYS>>\n\n"
        "{% elif m['role'] == 'user' %}[INST] {{ m['content'] | trim }} [/INST]"
        "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
    ),
    "turns numbered": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }} {{ loop.index }}\n"
        "{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant {{ messages | length + 1 }}\n{% endif %}"
    ),
    "opens thoughts": (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
        "{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
    ),
    "looks into contents": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if 'secret' in m['content'] %}hidden: {{ m['content'] | upper }}{% else %}{{ m['content'] }}{% endif %}"
        "<|im_end|>\n{% endfor %}" + TAIL
    ),
}
# Whether conversations of several turns have a shape there.
FAMILIES = {"qwen2_5": True, "qwen3": False, "qwen3_instruct_2507": True, "llama3": True, "gemma": True, "phi3": True}
WORDS = (
    "two",
    "7",
    " blank ",
    "line\n\nline",
    "secret",
    "🙂 é",
    "<think>\nso\n</think>\n\nthen",
    "{}",
    "user",
    "<|im_end|>",
)


class Counting:
    """A tokenizer that counts the conversations it renders."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self.rendered = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._tokenizer(*args, **kwargs)

    def apply_chat_template(self, conversations: Sequence[Any], **kwargs: Any) -> Any:
        self.rendered += len(conversations)
        return self._tokenizer.apply_chat_template(conversations, **kwargs)


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    made = deepcopy(tiny_tokenizer)
    special = ["<think>", "</think>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    made.add_tokens([*special, "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<s>"], special_tokens=True)
    made.bos_token = "<s>"
    return made


def conversations(count: int, roles: Sequence[str], seed: int = 0) -> list[list[Message]]:
    draw = random.Random(seed)
    return [
        [{"role": role, "content": " ".join(draw.choices(WORDS, k=draw.randint(1, 4)))} for role in roles]
        for _ in range(count)
    ]


def by_beginnings(tokenizer: Any, rows: list[list[Message]]) -> list[Encoded | str]:
    encoded: list[Encoded | str] = []
    for row in rows:
        try:
            encoded += encode_conversations([row], tokenizer)
        except DataError as error:
            encoded.append(str(error))
    return encoded


ONE, TWO = ("user", "assistant"), ("user", "assistant", "user", "assistant")


@pytest.mark.parametrize("roles", [ONE, TWO, ("system", *TWO)], ids=len)
@pytest.mark.parametrize("template", [*TEMPLATES, *FAMILIES])
def test_labels_are_those_of_rendering_every_beginning(tokenizer: Any, template: str, roles: Sequence[str]) -> None:
    family = TRL_TEMPLATES / f"{template}.jinja"
    tokenizer.chat_template = family.read_text() if template in FAMILIES else TEMPLATES[template]
    if template == "gemma":
        roles = [role for role in roles if role != "system"]
    rows = conversations(60, roles)
    expected = by_beginnings(tokenizer, rows)
    rows = [row for row, one in zip(rows, expected, strict=True) if isinstance(one, Encoded)]
    shapes = Shapes()
    for batch in (rows[:40], rows[40:]):
        assert encode_conversations(batch, tokenizer, shapes=shapes) == by_beginnings(tokenizer, batch)


@pytest.mark.parametrize("template", [None, "trimmed, with folded system turn", "turns numbered", *FAMILIES])
def test_a_conversation_is_rendered_once(tokenizer: Any, template: str | None) -> None:
    if template in FAMILIES:
        tokenizer.chat_template = (TRL_TEMPLATES / f"{template}.jinja").read_text()
    elif template:
        tokenizer.chat_template = TEMPLATES[template]
    for roles in (ONE, TWO) if FAMILIES.get(str(template), True) else (ONE,):
        counting, shapes = Counting(tokenizer), Shapes()
        rows = [[{"role": role, "content": f"{role} {number}"} for role in roles] for number in range(200)]
        encode_conversations(rows[:50], counting, shapes=shapes)
        counting.rendered = 0
        encode_conversations(rows, counting, shapes=shapes)
        # One of them is rendered up to each turn, for a check.
        assert counting.rendered <= len(rows) + 3


def test_a_shape_that_a_batch_shows_to_be_wrong_is_given_up(tokenizer: Any) -> None:
    # The prompt alone has the mark that shows where an answer starts, if a word no probe has was said.
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>{% if 'plum' in messages[-1]['content'] %}{% else %}assistant\n"
        "{% endif %}{% endif %}"
    )
    rows = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 20
    plums = [[{"role": "user", "content": "plum"}, {"role": "assistant", "content": "b"}]] * 20
    shapes = Shapes()
    assert encode_conversations(rows, tokenizer, shapes=shapes) == by_beginnings(tokenizer, rows)
    for batch in (plums, rows + plums):
        assert encode_conversations(batch, tokenizer, shapes=shapes) == by_beginnings(tokenizer, batch)


def test_a_role_of_which_the_template_writes_nothing_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}<|im_start|>{{ m['role'] }}\n"
        "{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}" + TAIL
    )
    [lost] = conversations(1, ("user", "tool", "assistant"))
    for train_on_prompt in (False, True):
        with pytest.raises(DataError, match=r"nothing of turn 2, whose role is 'tool'(.|\n)*to do: .*chat_template"):
            encode_conversations([lost], tokenizer, train_on_prompt)
    assert encode_conversations(conversations(1, ONE), tokenizer)
