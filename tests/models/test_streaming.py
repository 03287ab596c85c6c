"""A model whose base streams, against the same model without; on the CPU, copies are plain and the ring is the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import adapted, decoder, ids, loss_and_grads
from peft import LoraConfig, PeftModel
from streamed import LAYERS, poisoned, write_checkpoint
from torch import Tensor, nn
from twins import randomise

from fourfold.errors import ConfigError, TrainingError
from fourfold.kernels import host_memory
from fourfold.models import streaming
from fourfold.models.block import FusedDecoderLayer, fuse_blocks
from fourfold.models.loading import load_model
from fourfold.models.preparing import load_adapter, prepare
from fourfold.models.recomputation import POLICIES
from fourfold.models.size import model_size
from fourfold.models.stream_ring import PlainCopies
from fourfold.models.streaming import stream_base, stream_of
from fourfold.quantization.hf_config import FourfoldConfig
from fourfold.quantization.hf_quantizer import quantize_model
from fourfold.quantization.linear import QuantizedLinear

KINDS = ["fused", "generic", "generic, checkpointed"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Quantized checkpoints of tiny decoders, by name."""
    written: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in written:
            written[name] = write_checkpoint(tmp_path_factory.mktemp(name), name)
        return written[name]

    return make


@pytest.fixture
def models(checkpoint: Callable[[str], Path]) -> Callable[..., tuple[PeftModel, PeftModel]]:
    """(the model whose base streams through a poisoned ring, the same without)."""

    def make(name: str = "llama-gqa", kind: str = "fused", source: str = "host", **options: Any) -> Any:
        pair = []
        for streams in (True, False):
            model = load_model(checkpoint(name), dtype=torch.float32, device="cpu")
            made = adapted(model, fused=kind == "fused", **options)
            if kind == "generic, checkpointed":
                made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
                made.enable_input_require_grads()
            if streams:
                poisoned(stream_base(made, "cpu", source=source))
            pair.append(made)
        return tuple(pair)

    return make


def assert_equal(ours: PeftModel, theirs: PeftModel, **inputs: Any) -> None:
    """Loss and gradients, bit for bit."""
    (loss, grads), (expected_loss, expected) = (loss_and_grads(each, **inputs) for each in (ours, theirs))
    assert torch.equal(loss, expected_loss)
    assert grads.keys() == expected.keys()
    assert len(grads) == LAYERS * 7 * 2
    assert [key for key in expected if not torch.equal(grads[key], expected[key])] == []


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3-head-norms"])
@pytest.mark.parametrize("source", streaming.SOURCES)
@pytest.mark.parametrize("policy", POLICIES)
def test_fused_layers_give_the_same_loss_and_gradients_under_every_policy(
    models: Callable[..., Any], name: str, source: str, policy: str
) -> None:
    ours, theirs = models(name, source=source, recompute=policy)
    for _ in range(2):
        assert_equal(ours, theirs)


@pytest.mark.parametrize("name", ["llama-gqa", "qwen3-head-norms", "qwen2-biases"])
@pytest.mark.parametrize("source", streaming.SOURCES)
@pytest.mark.parametrize("kind", KINDS[1:])
def test_generic_layers_give_the_same_loss_and_gradients(
    models: Callable[..., Any], name: str, source: str, kind: str
) -> None:
    ours, theirs = models(name, kind, source)
    for _ in range(2):
        assert_equal(ours, theirs)


@pytest.mark.parametrize("lora", [{"use_dora": True}, {"target_modules": ["q_proj"], "layers_to_transform": [3]}])
@pytest.mark.parametrize("kind", KINDS)
def test_dora_and_layers_without_adapters_give_the_same(
    models: Callable[..., Any], kind: str, lora: dict[str, Any]
) -> None:
    ours, theirs = models(kind=kind, **lora)
    for _ in range(2):
        (loss, grads), (expected_loss, expected) = (loss_and_grads(each) for each in (ours, theirs))
        assert torch.equal(loss, expected_loss)
        assert all(torch.equal(grads[key], expected[key]) for key in expected)


@pytest.mark.parametrize("source", streaming.SOURCES)
@pytest.mark.parametrize("kind", KINDS)
def test_three_steps_of_adamw_with_accumulation_and_evaluation_between_give_the_same(
    models: Callable[..., Any], kind: str, source: str
) -> None:
    pair = models("qwen3-head-norms", kind, source)
    traces = []
    for model in pair:
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trainable, lr=1e-2)
        trace: list[Tensor] = []
        for step in range(3):
            model.train()
            for part in range(2):
                tokens = ids(2, 9 + part + step)
                loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
                loss.backward()
                trace.append(loss.detach())
            trace += [parameter.grad.clone() for parameter in trainable]
            optimizer.step()
            optimizer.zero_grad()
            model.eval()
            with torch.no_grad():
                trace += [model(ids(1, length), use_cache=False).logits for length in (4, 7, 5)]
        traces.append(trace)
    assert len(traces[0]) == len(traces[1]) > 3 * LAYERS * 14
    assert all(torch.equal(*each) for each in zip(*traces, strict=True))


def test_two_forward_passes_before_two_backward_passes_give_the_same(models: Callable[..., Any]) -> None:
    for kind in KINDS:
        pair = models(kind=kind)
        grads = []
        for model in pair:
            model.train()
            losses = [model(input_ids=ids(2, n), labels=ids(2, n), use_cache=False).loss for n in (6, 9)]
            for loss in losses:
                loss.backward()
            grads.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
        assert all(torch.equal(*each) for each in zip(*grads, strict=True))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [0, 2, 4])
def test_an_exception_in_the_middle_of_a_pass_leaves_nothing_behind(
    models: Callable[..., Any], kind: str, layer: int
) -> None:
    ours, theirs = models(kind=kind)

    def fail(*_: Any) -> None:
        raise KeyboardInterrupt

    assert_equal(ours, theirs)
    block = ours.get_base_model().model.layers[layer]
    handle = block.register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        loss_and_grads(ours)
    handle.remove()
    assert_equal(ours, theirs)
    handle = block.register_full_backward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        loss_and_grads(ours)
    handle.remove()
    assert_equal(ours, theirs)


def test_generating_with_a_cache_gives_the_same(models: Callable[..., Any]) -> None:
    tokens = [each.eval().generate(ids(2, 5), max_new_tokens=6, do_sample=False) for each in models()]
    assert torch.equal(*tokens)


def test_a_training_step_copies_six_layers_less_than_it_passes(models: Callable[..., Any]) -> None:
    ours, _ = models(recompute="full")
    ring = stream_of(ours).ring
    loss_and_grads(ours)
    before = ring.num_copies
    loss_and_grads(ours)
    assert ring.num_copies - before == 2 * LAYERS - 6


@pytest.mark.parametrize("source", streaming.SOURCES)
def test_names_files_and_sizes_are_those_of_the_model_that_does_not_stream(
    models: Callable[..., Any], tmp_path: Path, source: str
) -> None:
    ours, theirs = models(source=source)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())
    assert model_size(ours) == model_size(theirs)
    for name, model in (("ours", ours), ("theirs", theirs)):
        model.save_pretrained(tmp_path / name)
        model.get_base_model().save_pretrained(tmp_path / f"{name}-base")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "ours" / name).read_bytes() == (tmp_path / "theirs" / name).read_bytes()
    weights = "model.safetensors"
    assert (tmp_path / "ours-base" / weights).read_bytes() == (tmp_path / "theirs-base" / weights).read_bytes()
    assert_equal(ours, theirs)


def test_merged_it_gives_the_same_and_unmerged_it_streams_again(models: Callable[..., Any]) -> None:
    ours, theirs = models()
    for each in (ours, theirs):
        each.merge_adapter()
    with torch.no_grad():
        assert torch.equal(ours(ids()).logits, theirs(ids()).logits)
    for each in (ours, theirs):
        each.unmerge_adapter()
    assert_equal(ours, theirs)
    assert torch.equal(*(each.merge_and_unload()(ids()).logits for each in (ours, theirs)))


def test_a_saved_or_second_adapter_can_be_put_on_a_base_that_streams(
    models: Callable[..., Any], checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    ours, theirs = models()
    theirs.save_pretrained(tmp_path)
    base = load_model(checkpoint("llama-gqa"), dtype=torch.float32, device="cpu")
    loaded = load_adapter(base, tmp_path, is_trainable=True, fused=True, stream_base="host", device="cpu")
    poisoned(stream_of(loaded))
    assert_equal(loaded, theirs)
    for each in (ours, theirs):
        each.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
        torch.manual_seed(1)
        each.base_model.set_adapter(["default", "second"])
        randomise(each, scale=0.05)
    (loss, grads), (expected_loss, expected) = (loss_and_grads(each) for each in (ours, theirs))
    assert torch.equal(loss, expected_loss)
    assert all(torch.equal(grads[key], expected[key]) for key in expected)


@pytest.mark.parametrize("source", streaming.SOURCES)
def test_moving_the_model_and_casting_it_leave_what_streams(models: Callable[..., Any], source: str) -> None:
    ours, theirs = models("qwen2-biases", source=source)
    weights = {name: p.data_ptr() for name, p in ours.named_parameters() if p.dtype == torch.uint8}
    assert len(weights) == LAYERS * 7
    for each in (ours, theirs):
        each.to("cpu").to(torch.bfloat16)
    assert {name: p.data_ptr() for name, p in ours.named_parameters() if p.dtype == torch.uint8} == weights
    layer = next(module for module in ours.modules() if isinstance(module, QuantizedLinear) and module.bias is not None)
    assert layer.bias.dtype == torch.bfloat16
    assert_equal(ours, theirs)


def test_streaming_before_adapters_or_before_fusing_is_the_same(checkpoint: Callable[[str], Path]) -> None:
    def make(order: str) -> PeftModel:
        model: Any = load_model(checkpoint("llama-gqa"), dtype=torch.float32, device="cpu")
        config = LoraConfig(r=4, lora_alpha=8)
        if order == "prepared":
            made = prepare(model, config, fused=True, stream_base="host", device="cpu")
        else:
            if order == "streamed":
                stream_base(model, "cpu")
            made = prepare(model, config, fused=True)
        return randomise(made, scale=0.05)

    reference = make("not at all")
    for order in ("prepared", "streamed"):
        made = make(order)
        poisoned(stream_of(made))
        assert_equal(made, reference)


def test_fused_layers_of_a_base_that_streams_have_no_cuda_graphs(models: Callable[..., Any]) -> None:
    ours, theirs = models()

    def graphs(model: nn.Module) -> set[bool]:
        return {module._graphs is not None for module in model.modules() if isinstance(module, FusedDecoderLayer)}

    assert (graphs(ours), graphs(theirs)) == ({False}, {True})
    fuse_blocks(ours.get_base_model(), cuda_graphs=True)
    assert graphs(ours) == {False}


@pytest.mark.parametrize("name", ["llama-gqa", "llama-odd"])
@pytest.mark.parametrize("double_quant", [True, False])
def test_the_bytes_foretold_are_those_of_the_buffers(name: str, double_quant: bool) -> None:
    model = decoder(name, quantized=False, num_hidden_layers=LAYERS)
    quantize_model(model, FourfoldConfig(bnb_4bit_use_double_quant=double_quant))
    sizes = []
    for layer in model.model.layers:
        for module in layer.modules():
            if isinstance(module, QuantizedLinear):
                count = module.in_features * module.out_features
                blocks = -(-count // 64)
                scales = [blocks, 4 * -(-blocks // 256), 4] if double_quant else [4 * blocks]
                sizes.append([-(-count // 2), *scales])
    by_layer = [streaming.layer_bytes(size for linear in sizes[7 * n : 7 * n + 7] for size in linear) for n in range(5)]
    stream = stream_base(model, "cpu")
    assert stream.layers == by_layer
    assert stream.device_bytes == streaming.device_bytes(by_layer) == sum(s.buffer.nbytes for s in stream.ring.slots)
    assert stream.host_bytes == streaming.host_bytes(by_layer)
    assert sum(buffer.data.nbytes for buffer in stream._buffers) == sum(by_layer)
    assert streaming.host_bytes(by_layer, "disk") == 3 * host_memory.rounded_to_pages(max(by_layer))
    assert all(size % 256 == 0 for size in by_layer)


def test_all_of_a_layer_lies_in_one_buffer_aligned_to_256_bytes(models: Callable[..., Any]) -> None:
    ours, _ = models()
    stream = stream_of(ours)
    for number, buffer in enumerate(stream._buffers):
        begin = buffer.data.data_ptr()
        for weight in stream._weights[number]:
            for tensor in streaming._tensors([weight]):
                assert begin <= tensor.data_ptr() < begin + buffer.data.nbytes
                assert (tensor.data_ptr() - begin) % 256 == 0


def test_what_cannot_stream_is_refused(checkpoint: Callable[[str], Path]) -> None:
    with pytest.raises(ConfigError, match=r"only quantized layers stream(.|\n)*model\.layers\.0"):
        stream_base(decoder("llama-gqa", quantized=False), "cpu")
    with pytest.raises(ConfigError, match=r"unknown place(.|\n)*tape(.|\n)*host, disk"):
        stream_base(decoder("llama-gqa"), "cpu", source="tape")
    with pytest.raises(ConfigError, match="no decoder layers"):
        stream_base(nn.Linear(2, 2), "cpu")
    model = decoder("llama-gqa")
    stream_base(model, "cpu")
    with pytest.raises(ConfigError, match="streams already"):
        stream_base(model, "cpu")
    with pytest.raises(ConfigError, match="cannot be copied"):
        copy.deepcopy(model)
    with pytest.raises(ConfigError, match="cannot be replaced"):
        model.load_state_dict(model.state_dict())
    layer = next(module for module in model.modules() if isinstance(module, QuantizedLinear))
    with pytest.raises(ConfigError, match="cannot be replaced"):
        layer.quantized = layer.quantized


def test_too_little_host_memory_is_told_before_it_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = stream_base(decoder("llama-gqa"), "cpu")
    monkeypatch.setattr(streaming, "available_bytes", lambda: 100)
    with pytest.raises(TrainingError, match=r"too little host memory(.|\n)*stream_base: disk"):
        streaming._require_memory(101, stream)
    monkeypatch.setattr(streaming, "available_bytes", lambda: None)
    streaming._require_memory(101, stream)


def test_plain_copies_serve_the_ring_on_the_cpu() -> None:
    assert isinstance(stream_base(decoder("llama-gqa"), "cpu").ring.copies, PlainCopies)
