from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fourfold.inference.text import Detokenizer, StopStrings

TEXTS = [
    "The capital of France is Paris.",
    "日本語のテキスト、and English. Ελληνικά",
    "👩‍👩‍👧‍👦 family, 🇫🇷 flag, é (combining: e\u0301)",
    "  leading, trailing  \n\n\ttabs",
]


def pieces(tokenizer: Any, token_ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.add(token) for token in token_ids), detokenizer.end()]


@pytest.fixture(scope="module")
def byte_fallback() -> PreTrainedTokenizerFast:
    """A tokenizer in the way of Llama 2's: words begin with ▁, what has no token is spelled in bytes."""
    vocab = {f"<0x{byte:02X}>": byte for byte in range(256)}
    for text in ("▁", "▁Paris", "▁is", "▁the", "s", "日"):
        vocab[text] = len(vocab)
    core = Tokenizer(models.BPE(vocab, [], byte_fallback=True))
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=core)


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_text_and_hold_no_half_character(tiny_tokenizer: Any, text: str) -> None:
    token_ids = tiny_tokenizer(text)["input_ids"]
    given = pieces(tiny_tokenizer, token_ids)
    assert "".join(given) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in given)


@pytest.mark.parametrize("text", TEXTS)
def test_a_real_tokenizers_pieces_join_to_the_text(smollm2_path: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    assert "".join(pieces(tokenizer, tokenizer(text)["input_ids"])) == text


def test_random_tokens_join_to_what_the_tokenizer_decodes(tiny_tokenizer: Any) -> None:
    draw = random.Random(0)
    for _ in range(100):
        token_ids = [draw.randrange(len(tiny_tokenizer)) for _ in range(draw.randint(1, 60))]
        assert "".join(pieces(tiny_tokenizer, token_ids)) == tiny_tokenizer.decode(token_ids, skip_special_tokens=True)


def test_characters_spelled_in_bytes_come_whole(byte_fallback: Any) -> None:
    cat = list("🐈".encode())
    names = ["▁Paris", "▁is", "日", "s", "▁the"]
    words = byte_fallback.convert_tokens_to_ids(names)
    token_ids = [words[0], *cat, words[1], *list("é".encode()), words[2], words[3], words[4]]
    given = pieces(byte_fallback, token_ids)
    assert "".join(given) == "Paris🐈 isé日s the"
    assert all("\N{REPLACEMENT CHARACTER}" not in piece for piece in given)


def test_bytes_that_never_become_a_character_are_given_in_the_end(tiny_tokenizer: Any) -> None:
    broken = tiny_tokenizer("é")["input_ids"][:1]
    assert pieces(tiny_tokenizer, broken) == ["", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize("stop", [["###"], ["\nUser:"], ["abab", "bb"], ["x", "##", "User"]])
def test_stop_strings_end_the_text_wherever_it_is_cut(stop: list[str]) -> None:
    draw = random.Random(1)
    for _ in range(300):
        text = "".join(draw.choice(["#", "a", "b", "\n", "User", ":", " "]) for _ in range(40))
        places = [text.find(one) for one in stop if one in text]
        # Of stop strings that are found with the same piece, the first in the text counts.
        finder, given, rest, is_found = StopStrings(stop), "", text, False
        while rest and not is_found:
            size = draw.randint(1, 4)
            piece, is_found = finder.add(rest[:size])
            given, rest = given + piece, rest[size:]
            assert not any(one in given for one in stop)
        if not is_found:
            given += finder.end()
        assert is_found == bool(places)
        assert text.startswith(given)
        assert is_found or given == text


def test_a_stop_string_is_cut_at_its_first_character() -> None:
    finder = StopStrings(["<end>"])
    assert finder.add("answer <e") == ("answer ", False)
    assert finder.add("nd> more") == ("", True)


def test_what_only_looked_like_a_stop_string_is_given() -> None:
    finder = StopStrings(["<end>"])
    assert finder.add("a <e") == ("a ", False)
    assert finder.add("lse>") == ("<else>", False)
    assert finder.add("<en") == ("", False)
    assert finder.end() == "<en"
