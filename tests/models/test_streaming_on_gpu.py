"""A base that streams to a GPU, against the same model that lies there."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import adapted, decoder, ids, loss_and_grads
from peft import PeftModel
from torch import Tensor

from fourfold.kernels.host_memory import HostBuffer, rounded_to_pages
from fourfold.models import streaming
from fourfold.models.block import fuse_blocks, set_recomputation
from fourfold.models.loading import load_model
from fourfold.models.recomputation import POLICIES
from fourfold.models.stream_ring import DeviceCopies, Slot
from fourfold.models.streaming import WeightStream, stream_base, stream_of
from fourfold.quantization.hf_config import FourfoldConfig

pytestmark = pytest.mark.gpu

LAYERS = 7
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 704, "head_dim": 64, "num_hidden_layers": LAYERS}
# Some milliseconds: longer than a layer of these models, and than the host takes to launch several.
DELAY = 5_000_000


@pytest.fixture(autouse=True)
def same_order_of_sums() -> Iterator[None]:
    """cuDNN's backward pass of the attention would sum in no fixed order."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*deterministic.*")
        yield
    torch.use_deterministic_algorithms(False)


class SlowCopies(DeviceCopies):
    """From its beginning to its end, a copy leaves garbage in the slot; with a delay between."""

    def copy(self, slot: Slot, source: Tensor) -> None:
        for event in slot.left:
            self.stream.wait_event(event)
        with torch.cuda.stream(self.stream):
            slot.buffer.fill_(255)
            torch.cuda._sleep(DELAY)
        super().copy(slot, source)


def with_slow_copies(stream: WeightStream) -> None:
    copies: Any = stream.ring.copies
    slow = SlowCopies(getattr(copies, "layers", []), stream.device)
    if stream.source == "disk":
        copies.copies = slow
    else:
        stream.ring.copies = slow


def with_slow_layers(model: PeftModel) -> None:
    """Layers whose work begins long after it was launched: a copy that does not wait for it would come before it."""
    for layer in model.get_base_model().model.layers:
        layer.register_forward_pre_hook(lambda *_: torch.cuda._sleep(DELAY))
        layer.register_full_backward_pre_hook(lambda *_: torch.cuda._sleep(DELAY))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("qwen3")
    dense = folder / "dense"
    decoder("qwen3-head-norms", torch.bfloat16, quantized=False, **SIZES).save_pretrained(dense)
    quantized = load_model(dense, quantization=FourfoldConfig(), dtype=torch.bfloat16, device="cpu")
    quantized.save_pretrained(folder, max_shard_size="1MB")
    return folder


def pair(checkpoint: Path, source: str = "host", *, fused: bool = True, **options: Any) -> tuple[PeftModel, PeftModel]:
    """(streams, does not)"""
    models = []
    for streams in (True, False):
        device = "cpu" if streams else "cuda"
        model = adapted(load_model(checkpoint, dtype=torch.bfloat16, device=device), fused=False, **options)
        if streams:
            stream_base(model, "cuda", source=source)
        if fused:
            assert fuse_blocks(model.get_base_model(), cuda_graphs=False) == LAYERS
            set_recomputation(model, "full")
        models.append(model)
    return models[0], models[1]


def recomputing(checkpoint: Path, source: str, policy: str) -> tuple[PeftModel, PeftModel]:
    models = pair(checkpoint, source)
    for model in models:
        set_recomputation(model, policy)
    return models


def assert_equal(ours: PeftModel, theirs: PeftModel, seq: int = 64) -> None:
    tokens = ids(2, seq, "cuda")
    (loss, grads), (expected_loss, expected) = (loss_and_grads(each, input_ids=tokens) for each in (ours, theirs))
    assert torch.equal(loss, expected_loss)
    assert len(grads) == LAYERS * 7 * 2
    assert [key for key in expected if not torch.equal(grads[key], expected[key])] == []


@pytest.mark.parametrize("source", streaming.SOURCES)
@pytest.mark.parametrize("policy", POLICIES)
def test_fused_layers_give_the_same_bits_however_slow_the_copies(checkpoint: Path, policy: str, source: str) -> None:
    ours, theirs = recomputing(checkpoint, source, policy)
    with_slow_copies(stream_of(ours))
    for _ in range(2):
        assert_equal(ours, theirs)


@pytest.mark.parametrize("source", streaming.SOURCES)
@pytest.mark.parametrize("fused", [True, False])
def test_a_copy_waits_for_the_work_that_reads_what_it_replaces(checkpoint: Path, fused: bool, source: str) -> None:
    ours, theirs = pair(checkpoint, source, fused=fused)
    with_slow_layers(ours)
    for _ in range(2):
        assert_equal(ours, theirs)


@pytest.mark.parametrize("source", streaming.SOURCES)
def test_generic_layers_give_the_same_bits_however_slow_the_copies(checkpoint: Path, source: str) -> None:
    ours, theirs = pair(checkpoint, source, fused=False)
    with_slow_copies(stream_of(ours))
    for _ in range(2):
        assert_equal(ours, theirs)


@pytest.mark.parametrize("source", streaming.SOURCES)
def test_evaluation_generation_and_another_stream_give_the_same_bits(checkpoint: Path, source: str) -> None:
    ours, theirs = pair(checkpoint, source)
    with_slow_copies(stream_of(ours))
    other = torch.cuda.Stream()
    for length in (5, 9, 7):
        with torch.no_grad():
            tokens = ids(2, length, "cuda")
            assert torch.equal(*(each.eval()(tokens, use_cache=False).logits for each in (ours, theirs)))
            other.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(other):
                elsewhere = ours(tokens, use_cache=False).logits
            torch.cuda.current_stream().wait_stream(other)
            assert torch.equal(elsewhere, theirs(tokens, use_cache=False).logits)
        assert_equal(ours, theirs)
    generated = [each.eval().generate(ids(2, 5, "cuda"), max_new_tokens=6, do_sample=False) for each in (ours, theirs)]
    assert torch.equal(*generated)


def test_in_steady_state_the_host_waits_for_nothing(checkpoint: Path) -> None:
    def waits(model: PeftModel) -> list[str]:
        tokens = ids(2, 64, "cuda")
        for _ in range(2):
            loss_and_grads(model, input_ids=tokens)
        torch.cuda.synchronize()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                loss_and_grads(model, input_ids=tokens)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        # Not what PyTorch says once of the mode itself.
        told = [one for one in caught if "called a synchronizing" in str(one.message)]
        return sorted(f"{one.filename}:{one.lineno}" for one in told)

    ours, theirs = pair(checkpoint)
    assert waits(ours) == waits(theirs)


@pytest.mark.parametrize("source", streaming.SOURCES)
def test_the_peak_is_below_the_whole_bases_size(tmp_path: Path, source: str) -> None:
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "head_dim": 64, "num_hidden_layers": 48}
    dense = tmp_path / "dense"
    decoder("llama-gqa", torch.bfloat16, quantized=False, **sizes).save_pretrained(dense)
    load_model(dense, quantization=FourfoldConfig(), dtype=torch.bfloat16, device="cpu").save_pretrained(tmp_path)
    tokens = ids(1, 64, "cuda")
    # The libraries' workspaces, which any model has.
    small = adapted(decoder("llama-gqa", torch.bfloat16, device="cuda"), fused=True, recompute="full")
    loss_and_grads(small, input_ids=tokens)
    del small
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    model = adapted(load_model(tmp_path, dtype=torch.bfloat16, device="cpu"), fused=False, r=2)
    stream = stream_base(model, "cuda", source=source)
    fuse_blocks(model.get_base_model(), "full")
    for _ in range(2):
        loss_and_grads(model, input_ids=tokens)
    peak = torch.cuda.max_memory_allocated() - before
    base = sum(stream.layers)
    assert stream.device_bytes == streaming.device_bytes(stream.layers) < base / 10
    assert peak < base


def test_the_base_may_lie_on_the_gpu_before_and_leaves_it(checkpoint: Path) -> None:
    model = adapted(load_model(checkpoint, dtype=torch.bfloat16, device="cuda"), fused=True, recompute="full")
    gc.collect()
    before = torch.cuda.memory_allocated()
    stream = stream_base(model)
    assert before - torch.cuda.memory_allocated() > 0.9 * sum(stream.layers) - stream.device_bytes
    assert_equal(model, pair(checkpoint)[1])
    model.to("cuda")
    assert_equal(model, pair(checkpoint)[1])


def test_merged_layers_are_on_the_gpu_and_in_host_memory_after_a_move_there(checkpoint: Path) -> None:
    ours, theirs = pair(checkpoint)
    merged = [each.merge_and_unload() for each in (ours, theirs)]
    assert {parameter.device.type for parameter in merged[0].parameters()} == {"cuda"}
    with torch.no_grad():
        assert torch.equal(*(each(ids(device="cuda")).logits for each in merged))
    moved = pair(checkpoint, fused=False)[0].cpu()
    with torch.no_grad():
        assert moved(ids()).logits.isfinite().all()
    assert {parameter.device.type for parameter in moved.merge_and_unload().parameters()} == {"cpu"}


def test_host_memory_is_locked_in_whole_pages_and_let_go_with_its_object() -> None:
    buffer = HostBuffer(5 * 2**20 + 3, pinned=True, purpose="a test")
    assert buffer.data.numel() == 5 * 2**20 + 3
    assert buffer.data.is_pinned()
    assert rounded_to_pages(buffer.data.numel()) < 5.01 * 2**20
    view = buffer.data[:8].fill_(7)
    target = torch.empty(8, dtype=torch.uint8, device="cuda")
    target.copy_(view, non_blocking=True)
    assert target.tolist() == [7] * 8
    del buffer
    gc.collect()
    assert not view.is_pinned()
    assert view.tolist() == [7] * 8


def test_a_model_that_is_dropped_lets_go_of_the_ring_and_of_the_locked_memory(checkpoint: Path) -> None:
    gc.collect()
    before = torch.cuda.memory_allocated()
    model = pair(checkpoint)[0]
    loss_and_grads(model, input_ids=ids(2, 64, "cuda"))
    view = stream_of(model)._buffers[0].data[:8]
    assert view.is_pinned()
    del model
    gc.collect()
    torch.cuda.synchronize()
    assert not view.is_pinned()
    assert torch.cuda.memory_allocated() - before < 2**20
