"""On a GPU `load_model` reads ahead: to the last bit it must be what Transformers' own reading gives there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import DECODERS, decoder
from safetensors.torch import save_file
from sameness import assert_same_model
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedModel

from fourfold.errors import FourfoldError
from fourfold.models import loading, reading_ahead
from fourfold.models.checkpoint_files import stored_tensors
from fourfold.models.loading import load_model
from fourfold.models.reading_ahead import ReadAhead
from fourfold.quantization.hf_config import FourfoldConfig

pytestmark = pytest.mark.gpu

Loader = Callable[..., PreTrainedModel]
CONFIGS: dict[str, Callable[[], FourfoldConfig | None]] = {
    "16-bit": lambda: None,
    "nf4": FourfoldConfig,
    "plain-scales": lambda: FourfoldConfig(bnb_4bit_use_double_quant=False),
    "int8-embeddings": lambda: FourfoldConfig("int8", quantize_embeddings=True),
}


@pytest.fixture
def load_slowly(monkeypatch: pytest.MonkeyPatch) -> Loader:
    def load(folder: Path, **options: Any) -> PreTrainedModel:
        with monkeypatch.context() as patch:
            patch.setattr(loading, "READ_AHEAD_FOR", ())
            return load_model(folder, **options)

    return load


@pytest.mark.parametrize("quantization", CONFIGS)
@pytest.mark.parametrize("name", DECODERS)
def test_every_family_is_what_transformers_loads(
    load_slowly: Loader, tmp_path: Path, name: str, quantization: str
) -> None:
    decoder(name, torch.bfloat16, quantized=False).save_pretrained(tmp_path, max_shard_size="200KB")
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    fast = load_model(tmp_path, quantization=CONFIGS[quantization](), **options)
    assert_same_model(fast, load_slowly(tmp_path, quantization=CONFIGS[quantization](), **options))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("quantization", ["16-bit", "nf4"])
def test_weights_are_cast_as_transformers_casts_them(
    load_slowly: Loader, tmp_path: Path, dtype: torch.dtype, quantization: str
) -> None:
    decoder("qwen2-biases", torch.bfloat16, quantized=False).save_pretrained(tmp_path)
    options: dict[str, Any] = {"dtype": dtype, "device": "cuda"}
    fast = load_model(tmp_path, quantization=CONFIGS[quantization](), **options)
    assert_same_model(fast, load_slowly(tmp_path, quantization=CONFIGS[quantization](), **options))


@pytest.mark.parametrize("quantization", ["nf4", "plain-scales"])
def test_checkpoints_that_are_quantized_load(load_slowly: Loader, tmp_path: Path, quantization: str) -> None:
    decoder("qwen2-biases", torch.bfloat16, quantized=False).save_pretrained(tmp_path / "dense")
    load_model(tmp_path / "dense", quantization=CONFIGS[quantization]()).save_pretrained(tmp_path / "quantized")
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    assert_same_model(load_model(tmp_path / "quantized", **options), load_slowly(tmp_path / "quantized", **options))


@pytest.mark.parametrize("quantization", ["16-bit", "nf4"])
def test_weights_that_transformers_merges_of_several_load(
    load_slowly: Loader, tmp_path: Path, quantization: str
) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 96}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=2, num_local_experts=3)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    options: dict[str, Any] = {"dtype": torch.bfloat16, "device": "cuda"}
    fast = load_model(tmp_path, quantization=CONFIGS[quantization](), **options)
    assert_same_model(fast, load_slowly(tmp_path, quantization=CONFIGS[quantization](), **options))


@pytest.mark.parametrize("quantization", ["16-bit", "nf4"])
def test_smollm2_takes_no_more_of_the_gpu_than_what_is_sent_ahead(
    load_slowly: Loader, smollm2_path: Path, quantization: str
) -> None:
    peaks, models = [], []
    for load in (load_slowly, load_model):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        models.append(load(smollm2_path, quantization=CONFIGS[quantization](), dtype=torch.bfloat16, device="cuda"))
        torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert_same_model(*models)
    largest = models[0].get_input_embeddings().weight.nbytes
    assert peaks[1] <= peaks[0] + reading_ahead.SENT_AHEAD_BYTES + largest


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight"])
def test_a_weight_that_is_not_finite_is_refused_in_the_same_words(
    load_slowly: Loader, tmp_path: Path, key: str, value: float
) -> None:
    model = decoder("llama-gqa", torch.bfloat16, quantized=False)
    model.get_parameter(key).data.view(-1)[5] = value
    model.save_pretrained(tmp_path)
    messages = []
    for load in (load_slowly, load_model):
        with pytest.raises(FourfoldError, match=key) as error:
            load(tmp_path, quantization=FourfoldConfig(), dtype=torch.bfloat16, device="cuda")
        messages.append(str(error.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("is_late", [True, False])
@pytest.mark.parametrize("held_bytes", [0, 2**30])
@pytest.mark.parametrize("own_stream", [True, False])
def test_tensors_are_whole_when_the_memory_of_those_before_is_still_in_use(
    tmp_path: Path, own_stream: bool, held_bytes: int, is_late: bool
) -> None:
    """Each is let go at once, while the GPU has yet to read it: what comes next may take its memory no sooner."""
    made = {f"t.{index}": torch.full((2**18,), index, dtype=torch.int32) for index in range(40)}
    save_file(made, tmp_path / "model.safetensors")
    stored = stored_tensors(tmp_path)
    assert stored is not None
    stream = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    busy = torch.randn(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        sizes = {"chunk_bytes": 300_000, "num_buffers": 3, "held_bytes": held_bytes}
        with ReadAhead(stored, torch.device("cuda", torch.cuda.current_device()), **sizes) as reader:
            ranges = []
            # Every other tensor is passed over, so that it is held, or let go with its copy on the way.
            for index in range(0, 40, 2):
                tensor = reader.tensors[f"t.{index}"][...]
                if is_late:
                    torch.mm(busy, busy)
                ranges.append(torch.stack(tensor.aminmax()))
                del tensor
            last = (reader.tensors["t.1"][...] == 1).all()
        assert [tuple(each.tolist()) for each in ranges] == [(index, index) for index in range(0, 40, 2)]
        assert last
