from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch

from fourfold.serving.constraints import Grammars
from fourfold.serving.errors import ApiError
from fourfold.serving.requests import JsonObject, JsonSchema

VOCAB = 512  # more logits than the tokenizer has tokens, as padded models have


@pytest.fixture(scope="module")
def grammars(tiny_tokenizer: Any) -> Grammars:
    return Grammars(tiny_tokenizer, VOCAB, [tiny_tokenizer.eos_token_id], max_bytes=2**16)


def schema(value: dict[str, Any]) -> JsonSchema:
    return JsonSchema.model_validate({"type": "json_schema", "json_schema": {"name": "x", "schema": value}})


def test_a_mask_allows_what_goes_on_with_the_schema_and_nothing_else(grammars: Grammars, tiny_tokenizer: Any) -> None:
    constraint = grammars.constraint(schema({"enum": ["EUR", "USD"]}))
    assert constraint is not None
    written: list[int] = []
    for character in '"EUR"':
        mask = constraint.mask(written)
        assert mask.shape == (VOCAB,)
        (token,) = tiny_tokenizer(character)["input_ids"]
        allowed = {tiny_tokenizer.decode([*written, index]) for index in mask.nonzero()[:, 0].tolist()}
        assert mask[token]
        assert all('"EUR"'.startswith(text) or '"USD"'.startswith(text) for text in allowed)
        constraint.advance(token)
        written.append(token)
    assert constraint.mask(written).nonzero()[:, 0].tolist() == [tiny_tokenizer.eos_token_id]


def test_constraints_of_one_schema_go_their_own_ways(grammars: Grammars, tiny_tokenizer: Any) -> None:
    one, other = (grammars.constraint(JsonObject(type="json_object")) for _ in range(2))
    assert one is not None
    assert other is not None
    (brace,) = tiny_tokenizer("{")["input_ids"]
    one.advance(brace)
    assert not torch.equal(one.mask([brace]), other.mask([]))
    assert other.mask([])[brace]


def test_no_constraint_where_any_text_will_do(grammars: Grammars) -> None:
    assert grammars.constraint(None) is None


DEEP: dict[str, Any] = {"type": "object"}
for _ in range(500):
    DEEP = {"anyOf": [DEEP]}


@pytest.mark.parametrize(
    "value",
    [
        {"type": "nonsense"},
        {"type": "string", "pattern": "((("},
        {"$ref": "http://example.com/x.json"},
        {"$ref": "file:///etc/hostname"},
        {"$ref": "#"},
        {"type": "object", "propertyNames": {"pattern": "^a"}},
        {"enum": ["x" * 2**16]},
        {"enum": ["\ud800"]},
        {"minimum": 10**400},
        DEEP,
        {
            "$defs": {f"a{i}": {"allOf": [{"anyOf": [{"$ref": f"#/$defs/a{i - 1}"}] * 2}] * 2} for i in range(1, 14)}
            | {"a0": {"type": "string"}},
            "$ref": "#/$defs/a13",
        },
        {"x-guidance": {"nonsense": 1}, "type": "string"},
    ],
    ids=range(12),
)
def test_a_bad_or_too_large_schema_is_refused_soon_and_says_why(grammars: Grammars, value: dict[str, Any]) -> None:
    began = time.monotonic()
    with pytest.raises(ApiError, match=r"the JSON schema is refused: .") as refused:
        grammars.constraint(schema(value))
    assert refused.value.status == 400
    assert refused.value.param == "response_format"
    assert time.monotonic() - began < 5


@pytest.mark.parametrize(
    "value",
    [
        {"type": "string", "pattern": "(a{1,1000}){1,1000}"},
        {"type": "array", "items": {"type": "string"}, "minItems": 10**9},
        {"type": "string", "maxLength": 10**9},
        {"enum": [str(index) * 8 for index in range(2000)]},
    ],
    ids=range(4),
)
def test_a_schema_of_many_answers_takes_no_time(grammars: Grammars, value: dict[str, Any]) -> None:
    began = time.monotonic()
    constraint = grammars.constraint(schema(value))
    assert constraint is not None
    assert constraint.mask([]).any()
    assert time.monotonic() - began < 5


def test_the_bytes_of_tokens_are_those_of_the_text(grammars: Grammars, tiny_tokenizer: Any) -> None:
    text = "Paid 1,249.50 € to Søren 🙂"
    ids = tiny_tokenizer(text)["input_ids"]
    assert b"".join(map(grammars.token_bytes, ids)).decode() == text
    assert json.loads(json.dumps(text)) == text
