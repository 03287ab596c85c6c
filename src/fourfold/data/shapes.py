"""Where answers stand, told from one rendering of a conversation instead of one for each of its turns.

Most templates write something of their own around each turn's content, which depends on the order of roles alone. What
that is, the shape, is learned by rendering contents of our own. Where a conversation's rendering is its shape filled
with its contents, character by character, the answers stand where they stand in the shape. All others, and the first
conversation of each shape in a batch, are looked at by rendering their beginnings (`fourfold.data.answers`); a shape
that says otherwise even once is given up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from fourfold.data.answers import AnswerSpan, Rendered, find_answers, render
from fourfold.data.turns import Message
from fourfold.errors import DataError

__all__ = ["Shapes"]

# Of fewer conversations of one shape in a batch, learning it costs more than it saves.
_WORTHWHILE = 16

# What contents a template might treat in its own way.
_PROBES = (
    "7",
    " two words ",
    "\n\nlines\nand lines\n\n",
    "<think>\nthought\n</think>\n\nsaid",
    "/no_think",
    "d\u00e9j\u00e0 vu \u4e16\u754c \U0001f642",
    '{"name": "tool", "arguments": {}}',
    "user\nassistant: [INST] system",
)

_CUTS: dict[tuple[bool, bool], Callable[[str], str]] = {
    (True, True): str,
    (False, True): str.lstrip,
    (True, False): str.rstrip,
    (False, False): str.strip,
}
"""What a template leaves of a content whose leading and trailing blanks it keeps, or does not."""


class _Answer(NamedTuple):
    """Of an assistant's turn: how far before or behind its content the answer and the token that ends it begin."""

    turn: int
    start: int
    end: int
    end_id: int


class _Shape(NamedTuple):
    """What stands before each content and behind the last, what is left of the contents, and the answers."""

    pieces: list[str]
    cuts: list[Callable[[str], str]]
    answers: list[_Answer]


class Shapes:
    """The shapes of one tokenizer's chat template, which are learned as conversations come."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, ...], _Shape | None] = {}
        self._whole: set[tuple[str, ...]] = set()

    def require_all_turns(self, tokenizer: Any, conversations: Sequence[list[Message]]) -> None:
        """Raise DataError where the template writes nothing of a turn, as some do of roles they do not know."""
        for messages in conversations:
            roles = _roles(messages)
            if roles in self._whole:
                continue
            marks = _marks(roles)
            try:
                [text] = render(tokenizer, [_conversation(roles, marks)])
            except DataError:
                # It refuses these roles, which each conversation will show, or these contents.
                self._whole.add(roles)
                continue
            lost = [turn for turn, mark in enumerate(marks) if mark not in text]
            if lost:
                raise DataError(
                    f"the chat template writes nothing of turn {lost[0] + 1}, whose role is {roles[lost[0]]!r}",
                    found=f"roles {list(roles)}",
                    allowed="roles that the template writes",
                    hint="take such turns out, or set the key chat_template to a template that knows the role",
                )
            self._whole.add(roles)

    def find_answers(self, tokenizer: Any, conversations: Sequence[Rendered]) -> list[list[AnswerSpan]]:
        """As `fourfold.data.answers.find_answers`, and the same. Always give the same tokenizer."""
        groups: dict[tuple[str, ...], list[int]] = {}
        for place, one in enumerate(conversations):
            groups.setdefault(_roles(one.messages), []).append(place)
        found: dict[int, list[AnswerSpan]] = {}
        for roles, places in groups.items():
            if roles not in self._known and len(places) >= _WORTHWHILE:
                self._known[roles] = _learn(tokenizer, roles)
            shape = self._known.get(roles)
            if shape is None:
                continue
            quick = {place: spans for place in places if (spans := _filled(shape, conversations[place])) is not None}
            checked = next(iter(quick), None)
            if checked is not None and find_answers(tokenizer, [conversations[checked]]) != [quick[checked]]:
                self._known[roles] = None
                continue
            found |= quick
        rest = [place for place in range(len(conversations)) if place not in found]
        found |= zip(rest, find_answers(tokenizer, [conversations[place] for place in rest]), strict=True)
        return [found[place] for place in range(len(conversations))]


def _roles(messages: list[Message]) -> tuple[str, ...]:
    return tuple([message["role"] for message in messages])


def _marks(roles: tuple[str, ...]) -> list[str]:
    return [f"Zq{turn}Qz" for turn in range(len(roles))]


def _filled(shape: _Shape, one: Rendered) -> list[AnswerSpan] | None:
    """The answers of a conversation that is `shape` filled with its contents; None if it is not, or a token is not
    where it should be."""
    messages, text, input_ids, encoding = one
    parts: list[str] = []
    starts, stops = [], []
    length = 0
    for piece, cut, message in zip(shape.pieces, shape.cuts, messages, strict=False):
        content = cut(message["content"])
        starts.append(length := length + len(piece))
        stops.append(length := length + len(content))
        parts += (piece, content)
    parts.append(shape.pieces[-1])
    if "".join(parts) != text:
        return None
    spans = []
    for turn, start, end, end_id in shape.answers:
        start += starts[turn]
        first, last = encoding.char_to_token(start), encoding.char_to_token(stops[turn] + end)
        if first is None or last is None or input_ids[last] != end_id:
            return None
        spans.append(AnswerSpan(first, last + 1, start))
    return spans


def _learn(tokenizer: Any, roles: tuple[str, ...]) -> _Shape | None:
    """The shape of conversations of these roles; None: they have none."""
    marks = _marks(roles)
    try:
        # No template writes tabs of its own beside a content.
        [marked] = _rendered(tokenizer, [_conversation(roles, [f"\t{mark}\t" for mark in marks])])
        shape = _read(marked, find_answers(tokenizer, [marked])[0], marks)
        count = len(_PROBES)
        probes = [[_PROBES[(turn + offset) % count] for turn in range(len(roles))] for offset in range(count)]
        rendered = _rendered(tokenizer, [_conversation(roles, contents) for contents in probes])
        expected = find_answers(tokenizer, rendered)
    except DataError:
        return None
    if shape is None:
        return None
    quick = [_filled(shape, one) for one in rendered]
    agrees = all(spans is None or spans == right for spans, right in zip(quick, expected, strict=True))
    return shape if agrees and any(quick) else None


def _conversation(roles: tuple[str, ...], contents: list[str]) -> list[Message]:
    return [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


def _rendered(tokenizer: Any, conversations: list[list[Message]]) -> list[Rendered]:
    texts = render(tokenizer, conversations)
    encoding = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)
    return [
        Rendered(*each) for each in zip(conversations, texts, encoding["input_ids"], encoding.encodings, strict=True)
    ]


def _read(marked: Rendered, spans: list[AnswerSpan], marks: list[str]) -> _Shape | None:
    text, offsets = marked.text, marked.encoding.offsets
    pieces, cuts, starts, stops = [], [], [], []
    end = 0
    for mark in marks:
        if text.count(mark) != 1 or (start := text.find(mark, end)) < 0:
            return None
        stop = start + len(mark)
        kept = text[max(start - 1, end) : start] == "\t", text[stop : stop + 1] == "\t"
        cuts.append(_CUTS[kept])
        starts.append(start - kept[0])
        pieces.append(text[end : starts[-1]])
        stops.append(end := stop + kept[1])
    pieces.append(text[end:])
    turns = [turn for turn, message in enumerate(marked.messages) if message["role"] == "assistant"]
    answers = [
        _Answer(turn, span.start - starts[turn], offsets[span.end - 1][0] - stops[turn], marked.input_ids[span.end - 1])
        for turn, span in zip(turns, spans, strict=True)
    ]
    return _Shape(pieces, cuts, answers)
