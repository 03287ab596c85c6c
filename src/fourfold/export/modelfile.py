"""Ollama's Modelfile for an exported model.

Ollama does not run a GGUF file's chat template: it looks for the most similar of the templates that it brings along
(https://github.com/ollama/ollama/blob/main/template/template.go), and takes none where none is similar. So the template
is written in its own language, where turns are written one after another, each the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

__all__ = ["modelfile", "turn_parts"]

_MARK = "the words of a turn"


def modelfile(tokenizer: PreTrainedTokenizerBase, stops: Sequence[int], file: str) -> str:
    """FROM, TEMPLATE and SYSTEM where they can say what the chat template does, and the tokens that stop a reply."""
    lines = [f"FROM ./{file}"]
    parts = turn_parts(tokenizer) if tokenizer.chat_template else None
    if parts is not None:
        turns, opening, system = parts
        branches = " else ".join(
            f'if eq .Role "{role}" }}}}{before}{{{{ .Content }}}}{after}{{{{' for role, (before, after) in turns.items()
        )
        lines.append(f'TEMPLATE """{{{{ range .Messages }}}}{{{{ {branches} end }}}}{{{{ end }}}}{opening}"""')
        if system:
            lines.append(f'SYSTEM """{system}"""')
    elif tokenizer.chat_template:
        lines.append("# The chat template has no counterpart in Ollama's terms: it takes the most similar of its own.")
    lines += [f'PARAMETER stop "{tokenizer.convert_ids_to_tokens(stop)}"' for stop in stops]
    return "\n".join(lines) + "\n"


def turn_parts(tokenizer: PreTrainedTokenizerBase) -> tuple[dict[str, tuple[str, str]], str, str] | None:
    """A chat template taken apart: what stands before and after the words of each role's turn, what a reply begins
    with, and the system turn that it writes where none is given.

    Returns:
        None if whole conversations, put together of these parts, are not what the template writes.
    """
    try:
        turns = {"system": _around(_render(tokenizer, ["system"]))}
        with_user = _render(tokenizer, ["system", "user"])
        start = len(_render(tokenizer, ["system"]))
        turns["user"] = _around(with_user[start:])
        turns["assistant"] = _around(_render(tokenizer, ["system", "user", "assistant"])[len(with_user) :])
        opening = _render(tokenizer, ["system", "user"], opened=True)[len(with_user) :]
        alone = _render(tokenizer, ["user"])
        own = alone.removesuffix("".join((turns["user"][0], _MARK, turns["user"][1])))
        before, after = turns["system"]
        system = own.removeprefix(before).removesuffix(after) if own else ""
        for roles in (["system", "user", "assistant", "user"], ["user", "assistant", "user"]):
            built = "".join(turns[role][0] + _MARK + turns[role][1] for role in roles)
            given = before + system + after if system and roles[0] == "user" else ""
            if given + built + opening != _render(tokenizer, roles, opened=True):
                return None
    except Exception:
        # A template may refuse a conversation with any error of its own.
        return None
    texts = [*(part for turn in turns.values() for part in turn), opening, system]
    if any('"""' in text or "{{" in text for text in texts):
        return None
    return turns, opening, system


def _render(tokenizer: PreTrainedTokenizerBase, roles: list[str], opened: bool = False) -> str:
    messages = [{"role": role, "content": _MARK} for role in roles]
    text: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=opened)
    bos = tokenizer.bos_token
    # Where the tokenizer begins each text with that token, so does Ollama.
    begins = bos is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    return str(text).removeprefix(bos) if begins else str(text)


def _around(turn: str) -> tuple[str, str]:
    before, found, after = turn.partition(_MARK)
    if not found:
        raise ValueError("a turn without its words")
    return before, after
