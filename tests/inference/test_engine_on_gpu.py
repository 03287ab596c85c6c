from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from small_models import VOCAB, generated, small_model

from fourfold.inference import Engine, EngineOptions, GenericStep, Request, SamplingOptions, SlotCache, step_for
from fourfold.inference.sampling import RowSampling, sample

pytestmark = pytest.mark.gpu

OPTIONS = EngineOptions(max_sequences=3, max_length=128, prefill_chunk=5, prefill_alone=7, first_bucket=16)


def prompts(count: int, seed: int = 0) -> list[tuple[int, ...]]:
    draw = random.Random(seed)
    return [tuple(draw.randrange(3, VOCAB) for _ in range(draw.choice((3, 9, 22)))) for _ in range(count)]


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neo"])
def test_greedy_answers_on_a_gpu_are_those_of_the_cpu(family: str, tiny_tokenizer: Any) -> None:
    engine = Engine(small_model(family).cuda(), tiny_tokenizer, OPTIONS)
    sequences = [engine.submit(Request(tokens, max_new_tokens=12)) for tokens in prompts(7)]
    while engine.has_work:
        engine.step()
    for sequence in sequences:
        assert sequence.error is None
        assert sequence.token_ids == generated(small_model(family), sequence.request.prompt_ids, 12)


@pytest.mark.parametrize("fused", [True, False])
def test_answers_of_captured_passes_are_those_of_the_cpu_while_the_cache_grows(
    fused: bool, tiny_tokenizer: Any
) -> None:
    model = small_model("llama").cuda()
    step = step_for(model, fused=fused)
    engine = Engine(model, tiny_tokenizer, OPTIONS, step=step)
    sequences = [engine.submit(Request(tokens, max_new_tokens=40)) for tokens in prompts(5, seed=3)]
    while engine.has_work:
        engine.step()
    assert step._graphs  # none was given up
    if step.fused is not None:
        assert step._graphs[step.fused].captures_prompts
    for sequence in sequences:
        assert sequence.error is None
        assert sequence.token_ids == generated(small_model("llama"), sequence.request.prompt_ids, 40)


def test_penalties_and_biases_on_a_gpu_choose_as_on_the_cpu(tiny_tokenizer: Any) -> None:
    answers = []
    for device in ("cpu", "cuda"):
        engine = Engine(small_model().to(device), tiny_tokenizer, OPTIONS)
        sampling = [
            SamplingOptions(frequency_penalty=0.3),
            SamplingOptions(presence_penalty=0.6, repetition_penalty=1.2),
            SamplingOptions(logit_bias=((11, 3.0), (12, -100.0))),
        ]
        asked = [engine.submit(Request(tokens, how, 24)) for tokens, how in zip(prompts(9), sampling * 3, strict=True)]
        while engine.has_work:
            engine.step()
        answers.append([sequence.token_ids for sequence in asked])
    assert answers[0] == answers[1]


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_a_decode_pass_with_sampling_is_captured_and_replayed(family: str) -> None:
    model = small_model(family).cuda()
    step = GenericStep(model)
    cache = SlotCache(step.shape, 4, 64, "cuda", first_bucket=32)
    lengths = []
    for slot, tokens in enumerate(prompts(3)):
        step.prefill(slot, torch.tensor(tokens, device="cuda"), cache, None)
        lengths.append(len(tokens))
    tokens = torch.tensor([5, 6, 7], device="cuda")
    slots = torch.tensor([2, 0, 1], device="cuda")
    positions = torch.tensor([lengths[2], lengths[0], lengths[1]], device="cuda")
    options = [
        SamplingOptions(),
        SamplingOptions(temperature=1.0, top_p=0.9),
        SamplingOptions(temperature=0.7, top_k=5, frequency_penalty=0.5, logit_bias=((4, 3.0), (9, -2.0))),
    ]
    rows = RowSampling.of(options, "cuda")
    counts = torch.randint(3, (3, VOCAB), dtype=torch.int32, device="cuda")

    def decode() -> torch.Tensor:
        return sample(step.decode(tokens, slots, positions, cache, None), rows, positions + 1, counts=counts)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        first = decode()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        drawn = decode()
    graph.replay()
    assert torch.equal(drawn, first)
    tokens.copy_(first)
    positions.add_(1)
    graph.replay()
    replayed = drawn.clone()
    assert torch.equal(decode(), replayed)


def test_the_accounting_bounds_the_peak(tiny_tokenizer: Any) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "max_position_embeddings": 4096}
    model = small_model("llama", **sizes).cuda()
    torch.cuda.empty_cache()
    outside = torch.cuda.memory_allocated() - sum(value.nbytes for value in model.parameters())
    torch.cuda.reset_peak_memory_stats()
    engine = Engine(model, tiny_tokenizer, EngineOptions(max_sequences=8, max_length=4096))
    draw = random.Random(1)
    sampling = SamplingOptions(temperature=1.0, top_p=0.9, repetition_penalty=1.1, presence_penalty=0.5)
    for _ in range(8):
        tokens = tuple(draw.randrange(3, VOCAB) for _ in range(4000))
        engine.submit(Request(tokens, sampling, max_new_tokens=8, ignore_eos=True))
    while engine.has_work:
        engine.step()
    # cuBLAS keeps a workspace.
    assert torch.cuda.max_memory_allocated() - outside <= engine.footprint.total + 64 * 2**20
