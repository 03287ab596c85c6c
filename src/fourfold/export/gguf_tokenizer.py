"""A tokenizer in GGUF's keys, as llama.cpp reads it: a byte-level BPE, its pre-tokenizer by name.

The keys are those of https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the names of pre-tokenizers, and what
each stands for, are those of llama.cpp's `src/llama-vocab.cpp`.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import gguf
from tokenizers import Regex, pre_tokenizers
from transformers import PreTrainedTokenizerBase

from fourfold.errors import ConfigError

__all__ = ["PRE_TOKENIZERS", "STOPS", "pre_tokenizer_named", "require_exportable", "write_tokenizer"]

_CASELESS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASES = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{{0}}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{{0}}"
_SLASHES = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"

_LLAMA3 = ("split " + _CASELESS + "|" + _LETTERS + r"|\p{N}{1,3}" + _REST, "bytes")

# What llama.cpp ends a reply at: the end of the text, of the turn, of the message.
STOPS = ("eos", "eot", "eom")

# llama.cpp's name: the steps, and whether a word that is a token is taken as it is, before any merge (`ignore_merges`;
# None where both give the same).
PRE_TOKENIZERS: dict[str, tuple[tuple[str, ...], bool | None]] = {
    "gpt-2": (("bytes by words",), False),
    "smollm": (("digits", "bytes by words"), False),
    "llama-bpe": (_LLAMA3, True),
    "smaug-bpe": (_LLAMA3, False),
    "qwen2": (("split " + _CASELESS + "|" + _LETTERS + r"|\p{N}" + _REST, "bytes"), False),
    "tekken": (("split " + _CASES.replace("{0}", "") + r"|\p{N}" + _SLASHES, "bytes"), True),
    "gpt-4o": (("split " + _CASES.replace("{0}", _CASELESS + "?") + r"|\p{N}{1,3}" + _SLASHES, "bytes"), False),
}


def require_exportable(tokenizer: PreTrainedTokenizerBase, num_rows: int) -> str:
    """The name of the pre-tokenizer under which llama.cpp reads this tokenizer.

    Args:
        tokenizer: The tokenizer.
        num_rows: Rows of the model's embedding.

    Raises:
        ConfigError: Another kind of tokenizer, or one that has more tokens than the model has rows.
    """
    state = _state(tokenizer)
    kind = state["model"]["type"]
    normalizer = (state.get("normalizer") or {"type": "none"})["type"]
    falls_back = bool(state["model"].get("byte_fallback"))
    if kind != "BPE" or falls_back or normalizer not in ("none", "NFC"):
        raise ConfigError(
            "this tokenizer cannot be written to GGUF",
            found=f"{kind}{' with byte fallback' if falls_back else ''}, normalizer {normalizer}",
            allowed="a byte-level BPE, as of Llama 3, Qwen, Mistral Nemo and SmolLM",
            hint="export to safetensors, and convert with llama.cpp's own converter",
        )
    if len(tokenizer) > num_rows:
        raise ConfigError(
            "the tokenizer has more tokens than the model's embedding has rows",
            found=f"{len(tokenizer)} tokens, {num_rows} rows",
        )
    steps = tuple(_steps(state.get("pre_tokenizer")))
    whole_words = bool(state["model"].get("ignore_merges"))
    for name, (known, ignores_merges) in PRE_TOKENIZERS.items():
        if steps == known and ignores_merges in (None, whole_words):
            return name
    raise ConfigError(
        "llama.cpp has no name for this tokenizer's pre-tokenizer that is known here",
        found=f"{' then '.join(steps)}, ignore_merges {str(whole_words).lower()}",
        allowed=f"those of {', '.join(PRE_TOKENIZERS)}",
        hint="export to safetensors, and convert with llama.cpp's own converter",
    )


def pre_tokenizer_named(name: str) -> Any:
    """The pre-tokenizer of the tokenizers library that llama.cpp's name stands for."""
    steps: list[Any] = []
    for step in PRE_TOKENIZERS[name][0]:
        if step == "digits":
            steps.append(pre_tokenizers.Digits(individual_digits=True))
        elif step.startswith("split "):
            steps.append(pre_tokenizers.Split(Regex(step.removeprefix("split ")), behavior="isolated"))
        else:
            steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=step == "bytes by words"))
    return pre_tokenizers.Sequence(steps)


def write_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, num_rows: int, stops: Sequence[int]
) -> None:
    """Tokens with their types, merges, special tokens, chat template.

    Args:
        writer: Where to.
        tokenizer: One that `require_exportable` lets pass.
        num_rows: Rows of the model's embedding; rows without a token get one that no text gives.
        stops: Tokens that end a reply, of which the file has room for three.
    """
    pre = require_exportable(tokenizer, num_rows)
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    added = tokenizer.added_tokens_decoder
    tokens, types = [], []
    for index in range(num_rows):
        if index not in names:
            tokens.append(f"[PAD{index}]")
            types.append(gguf.TokenType.UNUSED)
        elif index in added:
            tokens.append(added[index].content)
            types.append(gguf.TokenType.CONTROL if added[index].special else gguf.TokenType.USER_DEFINED)
        else:
            tokens.append(names[index])
            types.append(gguf.TokenType.NORMAL)
    merges = _state(tokenizer)["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    for name in ("bos", "pad", "unk"):
        index = getattr(tokenizer, f"{name}_token_id")
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    first = tokenizer.eos_token_id if tokenizer.eos_token_id is not None else stops[0]
    for name, index in zip(STOPS, [first, *(stop for stop in stops if stop != first)], strict=False):
        getattr(writer, f"add_{name}_token_id")(index)
    ids = tokenizer("a")["input_ids"]
    writer.add_add_bos_token(bool(ids) and ids[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(bool(ids) and ids[-1] == tokenizer.eos_token_id)
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)


def _state(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ConfigError("this tokenizer cannot be written to GGUF", found=type(tokenizer).__name__)
    state: dict[str, Any] = json.loads(backend.to_str())
    return state


def _steps(step: dict[str, Any] | None) -> list[str]:
    """A pre-tokenizer as the words of `PRE_TOKENIZERS`; what they cannot say is told as JSON."""
    if step is None:
        return ["none"]
    kind = step["type"]
    if kind == "Sequence":
        return [word for part in step["pretokenizers"] for word in _steps(part)]
    if kind == "Digits" and step["individual_digits"]:
        return ["digits"]
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return ["bytes by words" if step.get("use_regex", True) else "bytes"]
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"] and "Regex" in step["pattern"]:
        return ["split " + step["pattern"]["Regex"]]
    return [json.dumps(step)]
