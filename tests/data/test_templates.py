from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers import AutoTokenizer
from trl.chat_template_utils import get_training_chat_template

from fourfold.data import IGNORE_INDEX, check_tokenizer, encode_conversation
from fourfold.errors import DataError

ONE_TURN = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is 4."}]
TWO_TURNS = [
    *ONE_TURN,
    {"role": "user", "content": "It is 4.  Sure? ÄÖ 🙂"},
    {"role": "assistant", "content": "Yes 🙂,\nsure."},
]
TRL_TEMPLATES = Path(trl.__file__).parent / "chat_templates"

LLAMA2_LIKE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)
OPENS_THOUGHTS = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
NEVER_ENDS = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
REWRITES = "{% if messages | length > 2 %}many {% endif %}" + OPENS_THOUGHTS


@pytest.fixture
def tokenizer(tiny_tokenizer: Any) -> Any:
    return deepcopy(tiny_tokenizer)


def learned_text(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    """What is learned, with a bar wherever something between is not."""
    encoded = encode_conversation(messages, tokenizer)
    pieces: list[list[int]] = []
    previous = IGNORE_INDEX
    for token, label in zip(encoded.input_ids, encoded.labels, strict=True):
        assert label in (token, IGNORE_INDEX)
        if label != IGNORE_INDEX:
            if previous == IGNORE_INDEX:
                pieces.append([])
            pieces[-1].append(token)
        previous = label
    return "|".join(tokenizer.decode(piece) for piece in pieces)


def test_answers_only_labels_hold_the_answers_and_their_end_tokens_alone(tokenizer: Any) -> None:
    assert learned_text(tokenizer, ONE_TURN) == "It is 4.<|im_end|>"
    assert learned_text(tokenizer, TWO_TURNS) == "It is 4.<|im_end|>|Yes 🙂,\nsure.<|im_end|>"


def test_tokens_are_those_of_the_chat_template(tokenizer: Any) -> None:
    expected = tokenizer.apply_chat_template(TWO_TURNS, return_dict=True)["input_ids"]
    encoded = encode_conversation(TWO_TURNS, tokenizer, train_on_prompt=True)
    assert encoded.input_ids == encoded.labels == expected


def test_an_answer_starts_where_generation_starts(tokenizer: Any) -> None:
    prompt = tokenizer.apply_chat_template(ONE_TURN[:1], add_generation_prompt=True, return_dict=True)
    encoded = encode_conversation(ONE_TURN, tokenizer)
    masked = [label == IGNORE_INDEX for label in encoded.labels]
    assert masked.index(False) == len(prompt["input_ids"])


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (LLAMA2_LIKE, " It is 4. <|im_end|>| Yes 🙂,\nsure. <|im_end|>"),
        (OPENS_THOUGHTS, "It is 4.<|im_end|>|Yes 🙂,\nsure.<|im_end|>"),
    ],
)
def test_other_templates_are_split(tokenizer: Any, template: str, expected: str) -> None:
    tokenizer.chat_template = template
    assert learned_text(tokenizer, TWO_TURNS) == expected


def test_the_templates_own_bos_is_not_doubled(tokenizer: Any) -> None:
    tokenizer.bos_token = "<|im_start|>"
    tokenizer.chat_template = LLAMA2_LIKE
    encoded = encode_conversation(ONE_TURN, tokenizer)
    assert encoded.input_ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("family", ["qwen2_5", "qwen3", "qwen3_instruct_2507", "llama3", "gemma", "phi3"])
@pytest.mark.parametrize("messages", [ONE_TURN, TWO_TURNS], ids=["one turn", "two turns"])
def test_unmarked_templates_give_the_labels_that_trls_marked_ones_give(
    tokenizer: Any, family: str, messages: list[dict[str, str]]
) -> None:
    special = ["<think>", "</think>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    special += ["<start_of_turn>", "<end_of_turn>", "<|end|>", "<|user|>", "<|assistant|>", "<s>"]
    tokenizer.add_tokens(special, special_tokens=True)
    tokenizer.bos_token = "<s>"
    tokenizer.chat_template = (TRL_TEMPLATES / f"{family}.jinja").read_text()
    marked = deepcopy(tokenizer)
    marked.chat_template = get_training_chat_template(tokenizer=tokenizer)
    reference = marked.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    # TRL's Qwen3 template keeps empty thoughts in earlier turns; the answers themselves are compared.
    expected = tokenizer.decode(
        [t for t, m in zip(reference["input_ids"], reference["assistant_masks"], strict=True) if m]
    )
    ours = learned_text(tokenizer, messages).replace("|<think>", "<think>")
    for turn in messages:
        if turn["role"] == "assistant":
            assert turn["content"] in expected
            assert turn["content"] in ours
    assert strip_thoughts(ours) == strip_thoughts(expected)
    again = encode_conversation(messages, marked)
    assert [label != IGNORE_INDEX for label in again.labels] == [bool(m) for m in reference["assistant_masks"]]


def strip_thoughts(text: str) -> str:
    kept = text.replace("<think>", "").replace("</think>", "")
    return "".join(kept.replace("<|", "\0").replace("|>", "\1").replace("|", "").split())


def test_marks_that_leave_out_the_end_token_are_extended_by_it(tokenizer: Any) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}{% endgeneration %}"
        "{% else %}{{ m['content'] }}{% endif %}<|im_end|>\n{% endfor %}"
    )
    assert learned_text(tokenizer, TWO_TURNS) == "It is 4.<|im_end|>|Yes 🙂,\nsure.<|im_end|>"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (NEVER_ENDS, "at turn 2\n.*no special token ends the answer"),
        (REWRITES, "at turn 2\n.*rendered otherwise"),
        ("{{ raise_exception('roles must alternate') }}", "refuses the conversation\n.*roles must alternate"),
    ],
)
def test_a_template_that_cannot_be_split_says_so(tokenizer: Any, template: str, message: str) -> None:
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=message):
        encode_conversation(TWO_TURNS, tokenizer)


def test_a_tokenizer_without_chat_template_is_refused(tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match=r"no chat template(.|\n)*key chat_template"):
        check_tokenizer(tokenizer)


def test_a_missing_pad_token_becomes_a_dedicated_one_and_never_eos(tokenizer: Any) -> None:
    tokenizer.pad_token = None
    check_tokenizer(tokenizer)
    assert tokenizer.pad_token == "<|endoftext|>"

    tokenizer.pad_token = None
    tokenizer.eos_token = "<|endoftext|>"
    with pytest.raises(DataError, match=r"no pad token(.|\n)*key pad_token"):
        check_tokenizer(tokenizer)

    tokenizer.unk_token = "<|im_start|>"
    check_tokenizer(tokenizer)
    assert tokenizer.pad_token == "<|im_start|>"


def test_smollm2_learns_the_answer_and_its_end(smollm2_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    assert learned_text(tokenizer, TWO_TURNS) == "It is 4.<|im_end|>|Yes 🙂,\nsure.<|im_end|>"
