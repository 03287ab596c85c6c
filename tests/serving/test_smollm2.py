"""A real model: eight streams at a time, each as if it were alone, and JSON of a schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import openai
import pytest
import torch
from running import Running, running

from fourfold.hosted import find_hosted
from fourfold.hosting import load_hosted
from fourfold.inference import EngineOptions

QUESTIONS = [
    "What is the capital of France?",
    "Name three colours.",
    "What is 2 + 2?",
    "Say hello in Spanish.",
    "Write one sentence about the sea, about ships, and about the people who sail them.",
    "Who wrote Hamlet?",
    "What do bees make?",
    "Is the sky blue?",
]


@pytest.fixture(scope="module")
def smollm2(smollm2_path: Path) -> Iterator[Running]:
    # In fp32: in bf16 two likeliest tokens may tie, and a batch of another size decide it otherwise.
    hosted = replace(find_hosted(str(smollm2_path), name="smollm2"), load_options={"dtype": torch.float32})
    with running(load_hosted(hosted, EngineOptions(max_sequences=8, max_length=256))) as server:
        yield server


def ask(server: Running, question: str) -> str:
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
    events = client.chat.completions.create(
        model="smollm2",
        messages=[{"role": "user", "content": question}],
        temperature=0,
        max_tokens=8,
        stream=True,
    )
    return "".join(event.choices[0].delta.content or "" for event in events)


def test_eight_streams_at_a_time_answer_as_each_does_alone(smollm2: Running) -> None:
    alone = [ask(smollm2, question) for question in QUESTIONS]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda question: ask(smollm2, question), QUESTIONS))
    assert together == alone
    assert "Paris" in alone[0]
    smollm2.wait_until_idle()


def test_a_real_model_writes_json_of_a_schema(smollm2: Running) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "maximum": 150}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    answer = smollm2.post(
        messages=[{"role": "user", "content": "Emma is 31 years old. Answer with her name and age as JSON."}],
        temperature=0,
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
    ).json()
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert json.loads(answer["choices"][0]["message"]["content"]) == {"name": "Emma", "age": 31}
