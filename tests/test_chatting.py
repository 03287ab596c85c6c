from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM

from fourfold.chatting import ChatSession, chat
from fourfold.errors import InferenceError
from fourfold.inference import GenerationOptions, generate_replies

pytestmark = pytest.mark.usefixtures("one_quiet_thread")

ASKED = [{"role": "user", "content": "Who paid 3 euros?"}]
OPTIONS = GenerationOptions(max_new_tokens=24)


@pytest.fixture
def tokenizer(tiny_llama: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_llama)


def session(folder: Path, tokenizer: Any, options: GenerationOptions = OPTIONS) -> ChatSession:
    return ChatSession(AutoModelForCausalLM.from_pretrained(folder), tokenizer, options)


def test_a_reply_of_the_engine_is_that_of_generate_in_pieces(tiny_llama: Path, tokenizer: Any) -> None:
    talk = session(tiny_llama, tokenizer)
    assert talk.engine is not None
    pieces = list(talk.reply(ASKED))
    assert len(pieces) > 1
    assert ["".join(pieces)] == generate_replies(talk.model, tokenizer, [ASKED], OPTIONS)


def test_figures_tell_tokens_and_speed_and_the_next_turn_reads_only_what_is_new(
    tiny_llama: Path, tokenizer: Any
) -> None:
    talk = session(tiny_llama, tokenizer)
    reply = "".join(talk.reply(ASKED))
    assert talk.figures is not None
    assert (talk.figures.tokens, talk.figures.reused_tokens) == (24, 0)
    assert talk.figures.tokens_per_second is not None
    assert "24 tokens, " in talk.figures.line()
    longer = [*ASKED, {"role": "assistant", "content": reply}, {"role": "user", "content": "And 6 items?"}]
    second = "".join(talk.reply(longer))
    assert [second] == generate_replies(talk.model, tokenizer, [longer], OPTIONS)
    first_prompt = tokenizer.apply_chat_template(ASKED, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert talk.figures.reused_tokens >= len(first_prompt)


def test_a_reply_that_was_left_frees_the_engine(tiny_llama: Path, tokenizer: Any) -> None:
    talk = session(tiny_llama, tokenizer)
    assert talk.engine is not None
    stream = talk.reply(ASKED)
    next(stream)
    stream.close()  # type: ignore[attr-defined]
    assert talk.engine.free_slots == 1
    assert talk.figures is None
    assert ["".join(talk.reply(ASKED))] == generate_replies(talk.model, tokenizer, [ASKED], OPTIONS)


@pytest.mark.parametrize("engine", [True, False])
def test_a_stop_text_ends_the_reply(tiny_llama: Path, tokenizer: Any, engine: bool) -> None:
    whole = generate_replies(AutoModelForCausalLM.from_pretrained(tiny_llama), tokenizer, [ASKED], OPTIONS)[0]
    stop = whole[8:11]
    options = GenerationOptions(max_new_tokens=24, stop=(stop,))
    talk = session(tiny_llama, tokenizer, options)
    if not engine:
        talk.engine = None
    assert "".join(talk.reply(ASKED)) == whole[: whole.find(stop)]
    assert generate_replies(talk.model, tokenizer, [ASKED], options) == [whole[: whole.find(stop)]]


def test_a_models_repetition_penalty_holds_unless_another_is_asked_for(tiny_llama: Path, tokenizer: Any) -> None:
    talk = session(tiny_llama, tokenizer)
    plain = "".join(talk.reply(ASKED))
    talk.model.generation_config.repetition_penalty = 1.8
    penalized = "".join(talk.reply(ASKED))
    assert penalized != plain
    assert [penalized] == generate_replies(talk.model, tokenizer, [ASKED], OPTIONS)
    talk.options = GenerationOptions(max_new_tokens=24, repetition_penalty=1.0)
    assert "".join(talk.reply(ASKED)) == plain
    assert generate_replies(talk.model, tokenizer, [ASKED], talk.options) == [plain]


def test_models_that_the_engine_cannot_run_are_talked_to_all_the_same(tokenizer: Any) -> None:
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}
    model = MambaForCausalLM(MambaConfig(**sizes, pad_token_id=0, eos_token_id=2, bos_token_id=None))
    talk = ChatSession(model, tokenizer, OPTIONS)
    assert talk.engine is None
    assert talk.lines() == []
    assert ["".join(talk.reply(ASKED))] == generate_replies(model, tokenizer, [ASKED], OPTIONS)


def test_a_generation_config_that_asks_for_more_is_left_to_generate(tiny_llama: Path, tokenizer: Any) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.generation_config.no_repeat_ngram_size = 2
    talk = ChatSession(model, tokenizer, OPTIONS)
    assert talk.engine is None
    assert ["".join(talk.reply(ASKED))] == generate_replies(model, tokenizer, [ASKED], OPTIONS)


def test_a_conversation_longer_than_the_context_is_refused_and_the_next_is_answered(
    tiny_llama: Path, tokenizer: Any
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, max_position_embeddings=64)
    talk = ChatSession(model, tokenizer, OPTIONS)
    with pytest.raises(InferenceError, match="longer than the context"):
        list(talk.reply([{"role": "user", "content": "3 items " * 60}]))
    assert list(talk.reply([{"role": "user", "content": "3"}]))


def test_memory_is_told_by_part(tiny_llama: Path) -> None:
    lines = chat(str(tiny_llama)).lines()
    assert lines[0].startswith("memory for 1 sequence of up to 2,048 tokens")
    assert "cache" in lines[1]
