"""The endpoints over a real connection, asked by OpenAI's own client where that can."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import openai
import pytest
import torch
from running import MESSAGES, Running
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def client(tiny_server: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{tiny_server.url}/v1", api_key="none", max_retries=0)


@pytest.fixture(autouse=True)
def leaves_no_slot_taken(tiny_server: Running) -> Any:
    yield
    tiny_server.wait_until_idle()


def test_models_are_the_base_and_each_adapter_by_name(client: openai.OpenAI) -> None:
    listed = {model.id: model.to_dict() for model in client.models.list()}
    assert list(listed) == ["red", "v1.2", "base"]
    assert [model["root"] for model in listed.values()] == ["base", "base", None]
    assert client.models.retrieve("v1.2").id == "v1.2"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_a_greedy_chat_is_what_transformers_generates(client: openai.OpenAI, tiny_llama: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :]
    answer = client.chat.completions.create(model="base", messages=MESSAGES, temperature=0, max_tokens=24)  # type: ignore[arg-type]
    assert answer.choices[0].message.content == tokenizer.decode(expected, skip_special_tokens=True)
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (ids.shape[1], len(expected))


def test_a_stream_joined_is_the_whole_answer(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "red", "messages": MESSAGES, "temperature": 0, "max_completion_tokens": 30}
    whole = client.chat.completions.create(**asked)
    events = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    assert events[0].choices[0].delta.role == "assistant"
    assert "".join(event.choices[0].delta.content or "" for event in events if event.choices) == (
        whole.choices[0].message.content
    )
    assert events[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert events[-1].choices == []
    assert events[-1].usage == whole.usage
    assert len({event.id for event in events}) == 1


def test_models_of_one_base_answer_each_their_own(tiny_server: Running) -> None:
    texts = {
        name: tiny_server.post(model=name, temperature=0, max_tokens=20).json()["choices"][0]["message"]["content"]
        for name in ("base", "red", "v1.2")
    }
    assert len(set(texts.values())) == 3


def test_concurrent_answers_are_those_of_each_request_alone(tiny_server: Running) -> None:
    """Nobody sees another's tokens: of prompts of all lengths, models and parameters, twice as many as slots."""
    asked = [
        {
            "model": tiny_server.models[index % 3],
            "messages": [{"role": "user", "content": f"{index} euros " * (1 + index % 5)}],
            "temperature": 0 if index % 2 else 1.2,
            "seed": index,
            "max_tokens": 5 + 3 * index,
        }
        for index in range(12)
    ]

    def ask(fields: dict[str, Any]) -> Any:
        return tiny_server.post(**fields).json()["choices"]

    alone = [ask(fields) for fields in asked]
    with ThreadPoolExecutor(len(asked)) as pool:
        assert list(pool.map(ask, asked)) == alone


def test_choices_differ_and_a_seed_repeats_them(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "base", "messages": MESSAGES, "n": 3, "seed": 7, "max_tokens": 12}
    first, second = client.chat.completions.create(**asked), client.chat.completions.create(**asked)
    texts = [choice.message.content for choice in first.choices]
    assert len(set(texts)) == 3
    assert [choice.message.content for choice in second.choices] == texts
    streamed = ["", "", ""]
    for event in client.chat.completions.create(**asked, stream=True):
        streamed[event.choices[0].index] += event.choices[0].delta.content or ""
    assert streamed == texts
    assert client.chat.completions.create(**(asked | {"seed": 8})).choices[0].message.content != texts[0]


def test_penalties_and_biases_of_openai_choose_otherwise(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "base", "messages": MESSAGES, "temperature": 0, "max_tokens": 20}

    def text(**fields: Any) -> str | None:
        answer: str | None = client.chat.completions.create(**(asked | fields)).choices[0].message.content
        return answer

    plain = text()
    assert text(logit_bias={"70": 100}) not in (plain, text(logit_bias={"71": 100}))
    assert text(frequency_penalty=-2) not in (plain, text(presence_penalty=2))
    assert text() == plain


def test_chat_logprobs_are_the_models_own(client: openai.OpenAI, tiny_llama: Any) -> None:
    answer = client.chat.completions.create(
        model="base",
        messages=MESSAGES,
        temperature=0,
        max_tokens=8,
        logprobs=True,
        top_logprobs=3,  # type: ignore[arg-type]
    )
    told = answer.choices[0].logprobs
    assert told is not None
    assert told.content is not None
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    ids = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, return_tensors="pt")["input_ids"]
    for token in told.content:
        with torch.no_grad():
            expected = model(ids).logits[0, -1].log_softmax(0)
        likeliest = expected.topk(3)
        assert [each.logprob for each in token.top_logprobs] == pytest.approx(likeliest.values.tolist(), abs=1e-4)
        assert token.logprob == token.top_logprobs[0].logprob
        assert token.token == tokenizer.decode([int(likeliest.indices[0])])
        ids = torch.cat([ids, likeliest.indices[None, :1]], dim=1)
    # Characters of several tokens are whole by their bytes.
    whole = b"".join(bytes(token.bytes or []) for token in told.content)
    assert whole.decode("utf-8", "replace").startswith(answer.choices[0].message.content or "")


def test_completions_continue_texts_and_tokens(client: openai.OpenAI, tiny_llama: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    texts = ["Paid Nordwind", "The capital of"]
    asked: dict[str, Any] = {"model": "base", "temperature": 0, "max_tokens": 6}
    both = client.completions.create(prompt=texts, logprobs=2, **asked)
    assert [choice.index for choice in both.choices] == [0, 1]
    for text, choice in zip(texts, both.choices, strict=True):
        ids = tokenizer(text)["input_ids"]
        assert client.completions.create(prompt=ids, **asked).choices[0].text == choice.text
        assert choice.logprobs is not None
        assert "".join(choice.logprobs.tokens or []) == choice.text
        assert choice.logprobs.text_offset == [
            len("".join((choice.logprobs.tokens or [])[:index])) for index in range(len(choice.logprobs.tokens or []))
        ]
        assert all(len(top) == 2 for top in choice.logprobs.top_logprobs or [])
    streamed = ["", ""]
    for event in client.completions.create(prompt=texts, stream=True, **asked):
        streamed[event.choices[0].index] += event.choices[0].text
    assert streamed == [choice.text for choice in both.choices]


def test_a_stop_text_ends_an_answer_and_is_not_in_it(tiny_server: Running) -> None:
    asked = {"temperature": 0, "max_tokens": 40, "model": "red"}
    whole = tiny_server.post(**asked).json()["choices"][0]["message"]["content"]
    stop = whole[10:14]
    choice = tiny_server.post(**asked, stop=[stop, "never there"]).json()["choices"][0]
    assert choice["message"]["content"] == whole[: whole.index(stop)]
    assert choice["finish_reason"] == "stop"


SCHEMA = {
    "type": "object",
    "properties": {
        "date": {"type": "string", "pattern": r"^\d{4}-\d{2}-\d{2}$"},
        "amount": {"type": "integer", "minimum": 0, "maximum": 999},
        "currency": {"enum": ["EUR", "USD"]},
    },
    "required": ["date", "amount", "currency"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_answers_of_a_schema_are_of_it(client: openai.OpenAI, temperature: float) -> None:
    """Of random weights, which would never write it by themselves."""
    answer = client.chat.completions.create(
        model="base",
        messages=MESSAGES,  # type: ignore[arg-type]
        temperature=temperature,
        max_tokens=100,
        n=3,
        response_format={"type": "json_schema", "json_schema": {"name": "payment", "schema": SCHEMA, "strict": True}},
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        found = json.loads(choice.message.content or "")
        assert set(found) == {"date", "amount", "currency"}
        assert 0 <= found["amount"] <= 999
        assert found["currency"] in ("EUR", "USD")


def test_json_ends_where_it_is_whole_even_if_stop_tokens_are_to_be_ignored(tiny_server: Running) -> None:
    asked = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a", "b"]}}}
    choice = tiny_server.post(response_format=asked, ignore_eos=True, max_tokens=20).json()["choices"][0]
    assert json.loads(choice["message"]["content"]) in ("a", "b")
    assert choice["finish_reason"] == "stop"


def test_what_is_measured_is_told_to_prometheus(tiny_server: Running) -> None:
    def read() -> dict[str, float]:
        lines = [line.rsplit(" ", 1) for line in tiny_server.get("/metrics").text.splitlines() if line[0] != "#"]
        return {name: float(value) for name, value in lines}

    before = read()
    tiny_server.post(model="v1.2", max_tokens=9, ignore_eos=True)
    tiny_server.post(model="nobody")
    tiny_server.get("/some/path")
    after = read()

    def gained(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert gained('fourfold_generated_tokens_total{model="v1.2"}') == 9
    assert gained('fourfold_answers_total{finish_reason="length",model="v1.2"}') == 1
    assert gained('fourfold_time_to_first_token_seconds_count{model="v1.2"}') == 1
    assert gained('fourfold_requests_total{endpoint="/v1/chat/completions",status="200"}') == 1
    assert gained('fourfold_requests_total{endpoint="/v1/chat/completions",status="404"}') == 1
    assert gained('fourfold_requests_total{endpoint="other",status="404"}') == 1
    assert after["fourfold_slots"] == 4
    assert after["fourfold_running"] == after["fourfold_waiting"] == 0


@pytest.mark.parametrize(
    ("fields", "status", "said"),
    [
        ({"model": "nobody"}, 404, "red, v1.2, base"),
        ({"messages": []}, 400, "messages"),
        ({"messages": [{"role": "user", "content": "a " * 400}]}, 400, "maximum context length is 256 tokens"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]}, 400, "text"),
        ({"max_tokens": -1}, 400, "max_tokens"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 129}, 400, "Allowed are 1 to 128"),
        ({"max_tokens": 10**30}, 400, "max_tokens"),
        ({"n": 17}, 400, "more than 16"),
        ({"n": 10**18}, 400, "more than 16"),
        ({"temperature": -0.1}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"seed": 2**63}, 400, "seed"),
        ({"repetition_penalty": 5e-324}, 400, "repetition_penalty"),
        ({"stop": [""]}, 400, "stop"),
        ({"stop": ["x"] * 17}, 400, "stop"),
        ({"top_logprobs": 21, "logprobs": True}, 400, "top_logprobs"),
        ({"top_logprobs": 2}, 400, "needs logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, 400, "not supported"),
        ({"logit_bias": {"5": 101}}, 400, "logit_bias"),
        ({"logit_bias": {"-5": 1}}, 400, "logit_bias"),
        ({"logit_bias": {"05": 1, "5": 2}}, 400, "logit_bias"),
        ({"logit_bias": {"999999999": 1}}, 400, "no token 999999999; allowed are 0 to"),
        ({"logit_bias": {str(token): 1 for token in range(1025)}}, 400, "1024"),
        ({"frequency_penalty": 2.5}, 400, "frequency_penalty"),
        ({"presence_penalty": -2.5}, 400, "presence_penalty"),
        ({"stream_options": {"include_usage": True}}, 400, "stream: true"),
        ({"response_format": {"type": "xml"}}, 400, "response_format"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_answered_is_refused_in_openais_words(
    tiny_server: Running, fields: dict[str, Any], status: int, said: str
) -> None:
    response = tiny_server.post(**fields)
    assert response.status_code == status
    error = response.json()["error"]
    assert said in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_fields_that_ask_for_nothing_or_are_unknown_are_let_through(tiny_server: Running) -> None:
    response = tiny_server.post(
        max_tokens=2,
        frequency_penalty=0,
        tools=[],
        logit_bias={},
        tool_choice="none",
        store=True,
        nobody_knows={"a": 1},
    )
    assert response.status_code == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"null",
        b"[]",
        b'{"model": "base", "messages": [{"role": "user", "content": "\xff\xfe"}]}',
        rb'{"model": "base", "messages": [{"role": "user", "content": "\ud800"}]}',
        rb'{"model": "\ud800", "messages": [{"role": "user", "content": "a"}]}',
        b'{"model": "base", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
        b'{"model": "base", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1' + b"0" * 5000 + b"}",
        b"[" * 100_000,
        b'{"a":' * 20_000,
    ],
    ids=range(11),
)
def test_a_body_that_is_no_request_is_refused(tiny_server: Running, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/completions"):
        response = httpx2.post(tiny_server.url + path, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code in (400, 404), response.text
        assert response.json()["error"]["message"]


def test_token_ids_that_the_model_does_not_have_are_refused(tiny_server: Running) -> None:
    for prompt in ([10**6], [2**62], [-1], [[1, 2], [10**6]], [[]], [], "", ["a", ""]):
        response = tiny_server.post("/v1/completions", prompt=prompt)
        assert response.status_code == 400, prompt
