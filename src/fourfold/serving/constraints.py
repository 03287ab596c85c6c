"""Answers that are JSON of a schema: which tokens may come next, by llguidance; and the bytes of each token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import llguidance.hf
import numpy as np
import torch
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from fourfold.serving.errors import ApiError
from fourfold.serving.requests import JsonObject, JsonSchema, ResponseFormat

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

__all__ = ["Grammars", "JsonConstraint"]

# A small model may go on with white space for ever; one piece is enough to write JSON in any common way.
_OPTIONS: JsonCompileOptions = {"whitespace_pattern": r"[ \n]?"}
# One of a large schema takes a few MB.
_NUM_KEPT = 16


class JsonConstraint:
    """What the next token of one answer may be.

    Args:
        matcher: The grammar, at its beginning.
        vocab_size: Logits of a position.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._vocab_size = vocab_size

    def mask(self, token_ids: list[int]) -> torch.Tensor:
        """bool, [vocab_size], on the CPU. Raises RuntimeError where the grammar has become too complex."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
        if self._matcher.is_error():
            raise RuntimeError(f"the JSON schema cannot be followed further: {self._matcher.get_error()}")
        mask = np.zeros(self._vocab_size, dtype=np.bool_)
        known = np.unpackbits(bits, bitorder="little")[: self._vocab_size]
        mask[: len(known)] = known
        return torch.from_numpy(mask)

    def advance(self, token_id: int) -> None:
        """Go on by a token; a stop token ends it."""
        self._matcher.consume_token(token_id)


class Grammars:
    """Compiles schemas for one tokenizer.

    Args:
        tokenizer: A fast one of Transformers.
        vocab_size: Logits of a position.
        stop_ids: Tokens that may follow where the JSON is whole.
        max_bytes: Longest schema.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, stop_ids: Sequence[int], max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._vocab_size = vocab_size
        known = len(tokenizer)
        self._tokens: LLTokenizer = llguidance.hf.from_tokenizer(
            tokenizer, n_vocab=max(known, vocab_size), eos_token=[stop for stop in stop_ids if stop < known]
        )
        self._compiled = lru_cache(maxsize=_NUM_KEPT)(self._compile)

    def constraint(self, wanted: ResponseFormat | None) -> JsonConstraint | None:
        """A new constraint, or None where any text will do. May take a second; other threads go on meanwhile.

        Raises:
            ApiError: A schema that is too large, is none, or asks for what is not supported.
        """
        if isinstance(wanted, JsonSchema):
            schema = wanted.json_schema.schema_
        elif isinstance(wanted, JsonObject):
            schema = {"type": "object"}
        else:
            return None
        try:
            text = json.dumps(schema)
        except RecursionError as error:
            raise _refusal("it is nested too deeply") from error
        if len(text) > self._max_bytes:
            raise _refusal(f"it has {len(text)} bytes; allowed are {self._max_bytes}")
        return JsonConstraint(self._compiled(text).deep_copy(), self._vocab_size)

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text: of a character of several tokens, a part."""
        found: bytes = self._tokens.decode_bytes([token_id])
        return found

    def _compile(self, schema: str) -> LLMatcher:
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, overrides=_OPTIONS)
        except ValueError as error:
            raise _refusal(str(error)) from error
        matcher = LLMatcher(self._tokens, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
        # The first mask finds what no answer can satisfy.
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise _refusal(matcher.get_error())
        return matcher


def _refusal(reason: str) -> ApiError:
    said = reason.partition("<non-verbose/>")[0].strip()[:500]
    return ApiError(400, f"the JSON schema is refused: {said}", param="response_format")
