from __future__ import annotations

import random
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from small_models import FAMILIES, VOCAB, adapted_model, generated, small_model
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

from fourfold.errors import InferenceError
from fourfold.inference import Chunk, Engine, EngineOptions, GenericStep, Request, SamplingOptions, Sequence

OPTIONS = EngineOptions(max_sequences=3, max_length=128, prefill_chunk=5, prefill_alone=7, first_bucket=16)


def prompt(draw: random.Random, *lengths: int) -> tuple[int, ...]:
    return tuple(draw.randrange(3, VOCAB) for _ in range(draw.choice(lengths or (3, 5, 9, 14, 22))))


def run(engine: Engine) -> list[Chunk]:
    chunks = []
    while engine.has_work:
        chunks += engine.step()
    return chunks


def answer(engine: Engine, request: Request) -> Sequence:
    sequence = engine.submit(request)
    run(engine)
    return sequence


@pytest.fixture(autouse=True, params=[False, True], ids=["in turn", "ahead"])
def run_ahead(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """All that an engine does it does whether passes run ahead, as they do on a GPU, or not."""
    is_ahead: bool = request.param
    monkeypatch.setattr(sys.modules[__name__], "OPTIONS", replace(OPTIONS, run_ahead=is_ahead))
    return is_ahead


@pytest.fixture
def engine(tiny_tokenizer: Any, run_ahead: bool) -> Engine:
    return Engine(small_model(), tiny_tokenizer, OPTIONS)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_generate_alone_whoever_joins_and_leaves(family: str, tiny_tokenizer: Any) -> None:
    model = small_model(family)
    engine = Engine(model, tiny_tokenizer, OPTIONS)
    draw = random.Random(1)
    sequences = []
    for _ in range(8):
        sequences.append(engine.submit(Request(prompt(draw), max_new_tokens=draw.choice((1, 4, 9, 17)))))
        for _ in range(draw.randrange(4)):
            engine.step()
    run(engine)
    for sequence in sequences:
        request = sequence.request
        assert sequence.error is None
        assert sequence.token_ids == generated(model, request.prompt_ids, request.max_new_tokens)
        ends = sequence.token_ids[-1] == 2
        assert sequence.finish_reason == ("stop" if ends else "length")
        assert sequence.text == tiny_tokenizer.decode(sequence.token_ids, skip_special_tokens=True)
    assert engine.cache.length > OPTIONS.first_bucket
    assert engine.free_slots == 3


def test_smollm2_answers_in_a_batch_as_alone(smollm2_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(smollm2_path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(smollm2_path)
    engine = Engine(model, tokenizer, EngineOptions(max_sequences=2, first_bucket=64))
    questions = ["What is the capital of France?", "Hi", "Name three colours."]
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for question in questions
    ]
    sequences = [engine.submit(Request(tokens, max_new_tokens=12)) for tokens in prompts]
    run(engine)
    assert sequences[0].text == "The capital of France is Paris."
    assert sequences[2].token_ids == generated(model, tuple(prompts[2]), 12)


def test_each_request_has_its_adapter_or_none(tiny_tokenizer: Any) -> None:
    model = adapted_model()
    engine = Engine(model, tiny_tokenizer, OPTIONS)
    draw = random.Random(2)
    tokens = prompt(draw)
    requests = [Request(tokens, max_new_tokens=8, adapter=name) for name in ("default", None, "other", "default")]
    sequences = [engine.submit(request) for request in requests]
    run(engine)
    wanted: list[list[int]] = []
    for name in ("default", "other"):
        model.set_adapter(name, inference_mode=True)
        model.base_model.enable_adapter_layers()
        wanted.append(generated(model, tokens, 8))
    with model.disable_adapter():
        wanted.insert(1, generated(model, tokens, 8))
    assert [sequence.token_ids for sequence in sequences] == [*wanted, wanted[0]]
    assert len({tuple(tokens) for tokens in wanted}) == 3


def test_a_slot_written_by_another_adapter_is_not_reused(tiny_tokenizer: Any) -> None:
    engine = Engine(adapted_model(), tiny_tokenizer, EngineOptions(max_sequences=1, max_length=64))
    tokens = prompt(random.Random(3), 20)
    assert answer(engine, Request(tokens, adapter="default", max_new_tokens=4)).reused == 0
    other = answer(engine, Request(tokens, adapter="other", max_new_tokens=4))
    again = answer(engine, Request(tokens, adapter="other", max_new_tokens=4))
    assert (other.reused, again.reused) == (0, 19)
    assert other.token_ids == again.token_ids


def test_what_is_forgotten_is_read_again(tiny_tokenizer: Any) -> None:
    engine = Engine(adapted_model(), tiny_tokenizer, EngineOptions(max_sequences=1, max_length=64))
    tokens = prompt(random.Random(3), 20)
    before = answer(engine, Request(tokens, max_new_tokens=4))
    engine.forget()
    again = answer(engine, Request(tokens, max_new_tokens=4))
    assert (again.reused, again.token_ids) == (0, before.token_ids)


def test_a_seed_gives_the_same_answer_in_any_company(tiny_tokenizer: Any) -> None:
    draw = random.Random(4)
    request = Request(
        prompt(draw), sampling=SamplingOptions(temperature=1.2, top_p=0.95, seed=7), max_new_tokens=20, ignore_eos=True
    )

    def among(others: int) -> list[int]:
        engine = Engine(small_model(), tiny_tokenizer, OPTIONS)
        for number in range(others):
            engine.submit(Request(prompt(draw), sampling=SamplingOptions(temperature=2.0, top_k=9, seed=number)))
            engine.step()
        return answer(engine, request).token_ids

    alone = among(0)
    assert alone == among(1) == among(4)
    other_seed = Request(request.prompt_ids, SamplingOptions(temperature=1.2, top_p=0.95, seed=8), 20, ignore_eos=True)
    engine = Engine(small_model(), tiny_tokenizer, OPTIONS)
    assert answer(engine, other_seed).token_ids != alone


def test_a_repetition_penalty_counts_prompt_and_answer_as_generate_does(tiny_tokenizer: Any) -> None:
    model = small_model()
    engine = Engine(model, tiny_tokenizer, OPTIONS)
    draw = random.Random(5)
    for _ in range(4):
        tokens = prompt(draw)
        sequence = engine.submit(Request(tokens, SamplingOptions(repetition_penalty=1.5), max_new_tokens=24))
        engine.submit(Request(prompt(draw), max_new_tokens=9))
        run(engine)
        assert sequence.token_ids == generated(model, tokens, 24, repetition_penalty=1.5)


class OpenAIPenalties(LogitsProcessor):
    """Of what stands behind a prompt of so many tokens."""

    def __init__(self, prompt: int, frequency: float, presence: float) -> None:
        self.prompt, self.frequency, self.presence = prompt, frequency, presence

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        counts = input_ids[0, self.prompt :].bincount(minlength=scores.shape[1])
        return scores - self.frequency * counts - self.presence * (counts > 0)


def test_penalties_by_what_the_answer_has_are_its_own_whoever_had_the_slot_before(tiny_tokenizer: Any) -> None:
    model = small_model()
    engine = Engine(model, tiny_tokenizer, OPTIONS)
    draw = random.Random(5)
    changed = 0
    for frequency, presence in ((0.0, 0.0), (0.2, 0.0), (0.0, 0.4), (0.3, -0.1), (0.2, 0.0), (0.1, 0.1)):
        tokens = prompt(draw)
        sampling = SamplingOptions(frequency_penalty=frequency, presence_penalty=presence)
        sequence = engine.submit(Request(tokens, sampling, max_new_tokens=24))
        engine.submit(Request(prompt(draw), SamplingOptions(frequency_penalty=1.0), max_new_tokens=9))
        run(engine)
        penalties = LogitsProcessorList([OpenAIPenalties(len(tokens), frequency, presence)])
        assert sequence.token_ids == generated(model, tokens, 24, logits_processor=penalties)
        changed += sequence.token_ids != generated(model, tokens, 24)
    assert changed > 2


def test_a_bias_bans_and_forces_tokens_of_its_own_request_alone(tiny_tokenizer: Any) -> None:
    model = small_model()
    engine = Engine(model, tiny_tokenizer, OPTIONS)
    tokens = prompt(random.Random(5))
    plain = generated(model, tokens, 12)
    asked = {
        name: engine.submit(Request(tokens, SamplingOptions(logit_bias=bias), max_new_tokens=12, ignore_eos=True))
        for name, bias in (("none", ()), ("banned", ((plain[0], -100.0),)), ("forced", ((11, 100.0),)))
    }
    run(engine)
    assert asked["none"].token_ids[: len(plain)] == plain
    assert plain[0] not in asked["banned"].token_ids
    assert asked["forced"].token_ids == [11] * 12


def test_stop_strings_end_an_answer_and_are_not_part_of_it(engine: Engine, tiny_tokenizer: Any) -> None:
    draw = random.Random(6)
    across = 0
    for _ in range(10):
        tokens = prompt(draw)
        whole = answer(engine, Request(tokens, max_new_tokens=24, ignore_eos=True))
        if len(whole.text) < 8:
            continue
        start = draw.randrange(2, len(whole.text) - 4)
        stop = whole.text[start : start + 3]
        first_pieces = [tiny_tokenizer.decode(whole.token_ids[:count]) for count in range(len(whole.token_ids))]
        across += not any(piece.endswith(whole.text[: whole.text.find(stop)]) for piece in first_pieces)
        sequence = engine.submit(Request(tokens, max_new_tokens=24, ignore_eos=True, stop=(stop, "never there")))
        chunks = run(engine)
        assert sequence.finish_reason == "stop"
        assert sequence.text == whole.text[: whole.text.find(stop)]
        assert "".join(chunk.text for chunk in chunks) == sequence.text
        assert len(sequence.token_ids) < len(whole.token_ids) or whole.text.find(stop) + 3 >= len(whole.text)


def test_pieces_join_to_the_text_and_the_last_alone_says_why_it_ends(engine: Engine) -> None:
    draw = random.Random(7)
    sequences = [engine.submit(Request(prompt(draw), max_new_tokens=11, logprobs=0)) for _ in range(5)]
    chunks = run(engine)
    for sequence in sequences:
        own = [chunk for chunk in chunks if chunk.sequence is sequence]
        assert "".join(chunk.text for chunk in own) == sequence.text
        assert [token for chunk in own for token in chunk.token_ids] == sequence.token_ids
        assert [one.token_id for chunk in own for one in chunk.logprobs] == sequence.token_ids
        assert [chunk.finish_reason for chunk in own] == [None] * (len(own) - 1) + [sequence.finish_reason]


def test_log_probabilities_are_those_of_a_forward_pass(engine: Engine) -> None:
    draw = random.Random(8)
    tokens = prompt(draw)
    engine.submit(Request(prompt(draw), max_new_tokens=12))
    sampling = SamplingOptions(temperature=1.5, top_k=30, seed=3)
    sequence = engine.submit(Request(tokens, sampling, max_new_tokens=8, logprobs=4, ignore_eos=True))
    told = [one for chunk in run(engine) if chunk.sequence is sequence for one in chunk.logprobs]
    model = small_model()
    with torch.no_grad():
        logits = model(torch.tensor([[*tokens, *sequence.token_ids]])).logits[0, len(tokens) - 1 : -1]
    wanted = logits.log_softmax(dim=1)
    for one, row in zip(told, wanted, strict=True):
        assert one.logprob == pytest.approx(row[one.token_id].item(), abs=1e-4)
        best = row.topk(4)
        assert [token for token, _ in one.top] == best.indices.tolist()
        assert [value for _, value in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_a_conversation_goes_on_from_what_its_slot_holds(engine: Engine) -> None:
    draw = random.Random(9)
    first = prompt(draw, 22)
    one = answer(engine, Request(first, max_new_tokens=6, ignore_eos=True))
    answer(engine, Request(prompt(draw, 9), max_new_tokens=6))
    longer = (*first, *one.token_ids, *prompt(draw, 5))
    two = answer(engine, Request(longer, max_new_tokens=9))
    assert two.reused == len(first) + 5  # the last token was chosen, and not yet written
    assert two.token_ids == generated(small_model(), longer, 9)


def test_a_conversation_goes_on_behind_a_stop_that_nobody_could_foresee(engine: Engine) -> None:
    draw = random.Random(17)
    first = prompt(draw, 14)
    whole = answer(engine, Request(first, max_new_tokens=20, ignore_eos=True))
    stop = whole.text[len(whole.text) // 2 :][:3]
    one = answer(engine, Request(first, max_new_tokens=20, ignore_eos=True, stop=(stop,)))
    assert 2 < len(one.token_ids) < 20
    assert one.token_ids == whole.token_ids[: len(one.token_ids)]
    longer = (*first, *one.token_ids, *prompt(draw, 5))
    two = answer(engine, Request(longer, max_new_tokens=9))
    assert two.reused >= len(first)
    assert two.token_ids == generated(small_model(), longer, 9)


class Noted(GenericStep):
    """Counts passes."""

    passes = 0

    def decode(self, tokens: Tensor, *args: Any) -> Tensor:
        self.passes += 1
        return super().decode(tokens, *args)


def test_a_pass_begins_before_the_tokens_of_the_one_before_are_read(tiny_tokenizer: Any, run_ahead: bool) -> None:
    model = small_model()
    step = Noted(model)
    engine = Engine(model, tiny_tokenizer, OPTIONS, step=step)
    sequence = engine.submit(Request((5, 6, 7), max_new_tokens=6, ignore_eos=True))
    read = []
    while engine.has_work:
        engine.step()
        read.append((step.passes, len(sequence.token_ids)))
    # The first token is the prompt's; the end is foreseen, and no pass is for nothing.
    if run_ahead:
        assert read == [(0, 1), (1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (5, 6)]
    else:
        assert read == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5), (5, 6)]


def test_a_long_prompt_is_read_in_parts_while_others_go_on(engine: Engine, run_ahead: bool) -> None:
    draw = random.Random(10)
    running = engine.submit(Request(prompt(draw, 3), max_new_tokens=40, ignore_eos=True))
    engine.step()
    long = engine.submit(Request(prompt(draw, 22), max_new_tokens=2, ignore_eos=True))
    counts = []
    while not long.token_ids:
        engine.step()
        counts.append(len(running.token_ids))
    first = 1 if run_ahead else 2
    assert counts == list(range(first, first + len(counts)))
    assert len(counts) == 5  # 22 tokens, 5 at a time


def test_cancelling_frees_the_slot_at_once_and_leaves_the_others(engine: Engine) -> None:
    draw = random.Random(11)
    prompts = [prompt(draw) for _ in range(5)]
    sequences = [engine.submit(Request(tokens, max_new_tokens=20, ignore_eos=True)) for tokens in prompts]
    for _ in range(4):
        engine.step()
    assert (engine.running, engine.waiting) == (3, 2)
    engine.cancel(sequences[1])
    engine.cancel(sequences[4])
    engine.cancel(sequences[4])
    assert (engine.free_slots, engine.waiting) == (1, 1)
    told = {chunk.sequence.number: chunk.finish_reason for chunk in run(engine) if chunk.finish_reason}
    assert [told[one.number] for one in sequences] == ["length", "cancelled", "length", "length", "cancelled"]
    for place in (0, 2, 3):
        assert sequences[place].token_ids == generated(small_model(), prompts[place], 20, eos_token_id=None)


def test_prompts_that_cannot_be_answered_are_refused(engine: Engine) -> None:
    with pytest.raises(InferenceError, match=r"longer than the context\n  found:   128 tokens"):
        engine.submit(Request((5,) * 128))
    with pytest.raises(InferenceError, match="does not have"):
        engine.submit(Request((5, VOCAB)))
    with pytest.raises(InferenceError, match="does not have"):
        engine.submit(Request((-1,)))
    with pytest.raises(InferenceError, match="unknown adapter"):
        engine.submit(Request((5,), adapter="other"))
    assert not engine.has_work


def test_an_answer_ends_where_the_context_does(engine: Engine) -> None:
    sequence = answer(engine, Request((5,) * 120, max_new_tokens=500, ignore_eos=True))
    assert (sequence.finish_reason, len(sequence.token_ids)) == ("length", 8)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prompt_ids": ()},
        {"max_new_tokens": 0},
        {"max_new_tokens": -3},
        {"stop": ("",)},
        {"logprobs": 21},
        {"logprobs": -1},
    ],
)
def test_requests_that_ask_for_nothing_sensible_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InferenceError):
        Request(**({"prompt_ids": (1, 2)} | wrong))


class Alternating:
    """Lets tokens of one parity come, and then of the other."""

    def __init__(self, fails_at: int = 1000) -> None:
        self.parity = 0
        self.fails_at = fails_at

    def mask(self, token_ids: list[int]) -> Tensor:
        if len(token_ids) == self.fails_at:
            raise RuntimeError("no such state")
        return torch.arange(VOCAB) % 2 == self.parity

    def advance(self, token_id: int) -> None:
        self.parity = 1 - self.parity


class Nothing:
    def mask(self, token_ids: list[int]) -> Tensor:
        return torch.zeros(5, dtype=torch.bool)

    def advance(self, token_id: int) -> None: ...


def test_a_constraint_binds_its_own_request(engine: Engine) -> None:
    draw = random.Random(12)
    free, bound = prompt(draw), prompt(draw)
    one = engine.submit(Request(free, max_new_tokens=9))
    two = engine.submit(Request(bound, SamplingOptions(temperature=1.0), 9, constraint=Alternating(), ignore_eos=True))
    run(engine)
    assert one.token_ids == generated(small_model(), free, 9)
    assert [token % 2 for token in two.token_ids] == [0, 1, 0, 1, 0, 1, 0, 1, 0]


def test_a_fault_of_one_request_ends_that_one(engine: Engine) -> None:
    draw = random.Random(13)
    prompts = [prompt(draw) for _ in range(3)]
    well = engine.submit(Request(prompts[0], max_new_tokens=9))
    failing = engine.submit(Request(prompts[1], max_new_tokens=9, constraint=Alternating(fails_at=2), ignore_eos=True))
    stuck = engine.submit(Request(prompts[2], max_new_tokens=9, constraint=Nothing()))
    run(engine)
    assert well.token_ids == generated(small_model(), prompts[0], 9)
    assert (failing.finish_reason, failing.error, len(failing.token_ids)) == ("error", "no such state", 2)
    assert stuck.finish_reason == "error"
    assert "no token can be chosen" in (stuck.error or "")
    assert engine.free_slots == 3


class Faulty(GenericStep):
    """Runs out of memory, or fails on a token."""

    fails_on = -1
    memory = 10_000

    def prefill(self, slot: int, input_ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if len(input_ids) > self.memory:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
        return super().prefill(slot, input_ids, *args, **kwargs)

    def decode(self, tokens: Tensor, *args: Any) -> Tensor:
        if self.fails_on in tokens:
            raise RuntimeError("device-side assert")
        return super().decode(tokens, *args)


def test_a_pass_that_fails_ends_only_the_sequence_it_fails_for(tiny_tokenizer: Any) -> None:
    model = small_model()
    step = Faulty(model)
    engine = Engine(model, tiny_tokenizer, OPTIONS, step=step)
    draw = random.Random(14)
    prompts = [prompt(draw) for _ in range(3)]
    wanted = [generated(model, tokens, 9, eos_token_id=None) for tokens in prompts]
    step.fails_on = next(token for token in wanted[1][:-1] if token not in wanted[0] + wanted[2])
    sequences = [engine.submit(Request(tokens, max_new_tokens=9, ignore_eos=True)) for tokens in prompts]
    run(engine)
    assert [sequence.finish_reason for sequence in sequences] == ["length", "error", "length"]
    assert [sequences[0].token_ids, sequences[2].token_ids] == [wanted[0], wanted[2]]


def test_a_prompt_that_does_not_fit_waits_for_those_that_run_and_fails_when_alone(tiny_tokenizer: Any) -> None:
    model = small_model()
    step = Faulty(model)
    engine = Engine(model, tiny_tokenizer, OPTIONS, step=step)
    draw = random.Random(15)
    short, long = prompt(draw, 3), prompt(draw, 22)
    step.memory = 4
    one = engine.submit(Request(short, max_new_tokens=9, ignore_eos=True))
    engine.step()
    two = engine.submit(Request(long, max_new_tokens=3, ignore_eos=True))
    engine.step()
    assert (two.finish_reason, engine.waiting, engine.running) == (None, 1, 1)
    step.memory = 100  # what the first one leaves
    run(engine)
    assert one.token_ids == generated(model, short, 9, eos_token_id=None)
    assert two.token_ids == generated(model, long, 3, eos_token_id=None)
    step.memory = 4
    three = answer(engine, Request(long[::-1], max_new_tokens=3))
    assert three.finish_reason == "error"
    assert "out of memory" in (three.error or "")
    assert engine.free_slots == 3


def test_no_slot_leaks_and_no_sequence_gets_anothers_tokens(tiny_tokenizer: Any) -> None:
    model = adapted_model()
    step = Faulty(model)
    draw = random.Random(16)
    engine = Engine(model, tiny_tokenizer, OPTIONS, step=step)
    sequences: list[Sequence] = []
    chunks: list[Chunk] = []
    cancelled = set()
    beginnings = [prompt(draw, 9) for _ in range(3)]
    for turn in range(160):
        step.memory = draw.choice((3, 100, 100, 100))
        if draw.random() < 0.3 and turn < 130:
            request = Request(
                (*draw.choice(beginnings), *prompt(draw, 1, 4, 9)),
                max_new_tokens=draw.choice((1, 3, 12)),
                adapter=draw.choice((None, "default", "other")),
                stop=draw.choice(((), ("e",), ("ab", "zz"))),
            )
            sequences.append(engine.submit(request))
        if sequences and draw.random() < 0.1:
            sequence = draw.choice(sequences[-6:])
            if sequence.finish_reason is None:
                cancelled.add(sequence.number)
            engine.cancel(sequence)
        chunks += engine.step()
        assert engine.free_slots + engine.running == 3
    step.memory = 100
    chunks += run(engine)
    assert engine.free_slots == 3
    assert engine.waiting == 0
    reasons = {sequence.finish_reason for sequence in sequences}
    assert {"stop", "length", "cancelled"} <= reasons
    for sequence in sequences:
        request = sequence.request
        own = [chunk for chunk in chunks if chunk.sequence is sequence]
        assert [chunk.finish_reason for chunk in own if chunk.finish_reason] == [sequence.finish_reason]
        assert "".join(chunk.text for chunk in own) == sequence.text
        assert (sequence.number in cancelled) == (sequence.finish_reason == "cancelled")
        if sequence.finish_reason == "error":
            continue
        step.use(request.adapter)
        wanted = generated(model, request.prompt_ids, request.max_new_tokens)
        assert sequence.token_ids == wanted[: len(sequence.token_ids)]
