from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fourfold.errors import ConfigError, DataError
from fourfold.inference import GenerationOptions, eval_mode, generate_replies, stop_token_ids, stream_reply

QUESTIONS = ["Hi", "What is the capital of France?", "Paid Nordwind 1,249.50 euros.", "Who?", "3 items " * 9]
CONVERSATIONS = [[{"role": "user", "content": question}] for question in QUESTIONS]


@pytest.fixture
def model(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


@pytest.mark.parametrize("batch_size", [2, 5])
def test_greedy_replies_do_not_depend_on_the_batch(model: Any, tokenizer: Any, batch_size: int) -> None:
    one = generate_replies(model, tokenizer, CONVERSATIONS, GenerationOptions(max_new_tokens=24, batch_size=1))
    many = generate_replies(
        model, tokenizer, CONVERSATIONS, GenerationOptions(max_new_tokens=24, batch_size=batch_size)
    )
    assert one == many
    assert len(set(one)) > 1


def test_greedy_replies_are_those_of_generate_alone(model: Any, tokenizer: Any) -> None:
    replies = generate_replies(model, tokenizer, CONVERSATIONS, GenerationOptions(max_new_tokens=24))
    for conversation, reply in zip(CONVERSATIONS, replies, strict=True):
        prompt = tokenizer.apply_chat_template(
            conversation, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        with eval_mode(model):
            generated = model.generate(**prompt, max_new_tokens=24, do_sample=False)
        width = prompt["input_ids"].shape[1]
        assert reply == tokenizer.decode(generated[0, width:], skip_special_tokens=True)


@pytest.mark.parametrize("token", ["configured", "tokenizer", "template"])
def test_a_reply_ends_at_every_stop_token(model: Any, tokenizer: Any, token: str) -> None:
    options = GenerationOptions(max_new_tokens=12)
    full = generate_replies(model, tokenizer, CONVERSATIONS[:1], options)[0]
    prompt = tokenizer.apply_chat_template(
        CONVERSATIONS[0], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    generated = model.eval().generate(**prompt, max_new_tokens=12, do_sample=False)[0].tolist()
    new = generated[prompt["input_ids"].shape[1] :]
    stop = next(token for position, token in enumerate(new) if position >= 3 and token not in new[:position])
    text = tokenizer.convert_ids_to_tokens(stop)
    if token == "configured":
        model.generation_config.eos_token_id = [stop, tokenizer.eos_token_id]
    elif token == "tokenizer":
        tokenizer.eos_token = text
    else:
        tokenizer.add_tokens([text], special_tokens=True)
        tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", text)
    assert stop in stop_token_ids(model, tokenizer)
    if token != "template":  # another template is another prompt
        shorter = generate_replies(model, tokenizer, CONVERSATIONS[:1], options)[0]
        assert full.startswith(shorter)
        assert len(shorter) < len(full)


def test_neither_tokenizer_nor_mode_nor_random_state_is_changed(model: Any, tokenizer: Any) -> None:
    model.train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    sides = (tokenizer.padding_side, tokenizer.pad_token, json.dumps(model.generation_config.to_dict()))
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    options = GenerationOptions(max_new_tokens=4, temperature=1.0)
    generate_replies(model, tokenizer, CONVERSATIONS, options)
    list(stream_reply(model, tokenizer, CONVERSATIONS[0], options))
    assert torch.equal(torch.rand(3), expected)
    assert [module.training for module in model.modules()] == modes
    assert sides == (
        tokenizer.padding_side,
        tokenizer.pad_token,
        json.dumps(model.generation_config.to_dict()),
    )


def test_sampling_follows_the_seed(model: Any, tokenizer: Any) -> None:
    def sample(seed: int) -> list[str]:
        options = GenerationOptions(max_new_tokens=16, temperature=1.5, top_p=0.9, seed=seed)
        return generate_replies(model, tokenizer, CONVERSATIONS, options)

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_progress_counts_conversations(model: Any, tokenizer: Any) -> None:
    seen: list[tuple[int, int]] = []
    generate_replies(
        model,
        tokenizer,
        CONVERSATIONS,
        GenerationOptions(max_new_tokens=2, batch_size=2),
        lambda done, total: seen.append((done, total)),
    )
    assert seen == [(2, 5), (4, 5), (5, 5)]


def test_no_conversations_give_no_replies(model: Any, tokenizer: Any) -> None:
    assert generate_replies(model, tokenizer, [], GenerationOptions()) == []


@pytest.mark.parametrize("temperature", [0.0, 1.5])
def test_a_streamed_reply_is_the_batched_one_in_pieces(model: Any, tokenizer: Any, temperature: float) -> None:
    options = GenerationOptions(max_new_tokens=24, temperature=temperature)
    conversation = CONVERSATIONS[1]
    pieces = list(stream_reply(model, tokenizer, conversation, options))
    assert len(pieces) > 1
    assert "".join(pieces) == generate_replies(model, tokenizer, [conversation], options)[0]


def test_a_closed_stream_stops_the_generation(model: Any, tokenizer: Any) -> None:
    model.train()
    threads = set(threading.enumerate())
    stream = stream_reply(model, tokenizer, CONVERSATIONS[0], GenerationOptions(max_new_tokens=100_000))
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    # Those of other tests may have ended meanwhile.
    assert set(threading.enumerate()) <= threads
    assert model.training


def test_a_failure_while_streaming_reaches_the_reader(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model, "forward", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(stream_reply(model, tokenizer, CONVERSATIONS[0], GenerationOptions(max_new_tokens=4)))


def test_a_tokenizer_without_chat_template_is_refused(model: Any, tokenizer: Any) -> None:
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        generate_replies(model, tokenizer, CONVERSATIONS, GenerationOptions())


@pytest.mark.parametrize(
    "wrong", [{"max_new_tokens": 0}, {"temperature": -0.1}, {"top_p": 0.0}, {"top_p": 1.1}, {"batch_size": 0}]
)
def test_options_that_are_not_allowed_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"key {next(iter(wrong))}"):
        GenerationOptions(**wrong)


def test_smollm2_knows_the_capital_of_france_and_stops(smollm2_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    replies = generate_replies(model, tokenizer, [CONVERSATIONS[1]], GenerationOptions(max_new_tokens=24))
    assert replies == ["The capital of France is Paris."]


def test_tokens_are_continued_as_the_text_they_are_and_a_reply_ends_before_a_stop_text(
    model: Any, tokenizer: Any
) -> None:
    texts = ["Paid Nordwind", "What is the capital of France?"]
    whole = generate_replies(model, tokenizer, texts, GenerationOptions(max_new_tokens=16))
    ids = [tokenizer(text)["input_ids"] for text in texts]
    assert generate_replies(model, tokenizer, ids, GenerationOptions(max_new_tokens=16)) == whole
    stop = (whole[0][4:7], "never written")
    cut = generate_replies(model, tokenizer, texts, GenerationOptions(max_new_tokens=16, stop=stop))
    assert cut[0] == whole[0][: whole[0].index(stop[0])]
    assert cut[1] == whole[1].partition(stop[0])[0]
    with pytest.raises(ConfigError, match="key stop"):
        GenerationOptions(stop=("",))
