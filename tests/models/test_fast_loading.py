from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import DECODERS, adapted, decoder, ids
from safetensors.torch import load_file, save_file
from sameness import assert_same_model
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM, PreTrainedModel

from fourfold.errors import CheckpointError, FourfoldError
from fourfold.models import fast_loading, loading, reading_ahead
from fourfold.models.loading import load_model
from fourfold.quantization.hf_config import FourfoldConfig

Loader = Callable[..., PreTrainedModel]


@pytest.fixture
def load_fast(monkeypatch: pytest.MonkeyPatch) -> Loader:
    """`load_model` onto the CPU as it loads onto a GPU; fails where it would take the other way."""
    calls: list[Path] = []
    whole = fast_loading.load_ahead

    def counted(folder: Path, *args: Any, **options: Any) -> Any:
        calls.append(folder)
        return whole(folder, *args, **options)

    def load(folder: Path, **options: Any) -> PreTrainedModel:
        with monkeypatch.context() as patch:
            patch.setattr(loading, "READ_AHEAD_FOR", ("cpu",))
            patch.setattr(loading, "load_ahead", counted)
            try:
                return load_model(folder, device="cpu", **options)
            finally:
                assert calls.pop() == folder

    return load


def assert_loads_the_same(load_fast: Loader, folder: Path, **options: Any) -> PreTrainedModel:
    fast = load_fast(folder, **options)
    assert_same_model(fast, load_model(folder, device="cpu", **options))
    return fast


QUANTIZATIONS = {
    "16-bit": lambda: None,
    "nf4": FourfoldConfig,
    "plain-scales": lambda: FourfoldConfig(bnb_4bit_use_double_quant=False),
    "int8": lambda: FourfoldConfig("int8"),
}


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("name", DECODERS)
def test_every_family_is_what_transformers_loads(
    load_fast: Loader, tmp_path: Path, name: str, quantization: str
) -> None:
    decoder(name, torch.bfloat16, quantized=False).save_pretrained(tmp_path)
    assert_loads_the_same(load_fast, tmp_path, quantization=QUANTIZATIONS[quantization](), dtype=torch.bfloat16)


@pytest.mark.parametrize("quantization", ["16-bit", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_every_stored_dtype_becomes_every_other(
    load_fast: Loader, tmp_path: Path, stored: torch.dtype, dtype: torch.dtype, quantization: str
) -> None:
    decoder("qwen2-biases", stored, quantized=False).save_pretrained(tmp_path)
    assert_loads_the_same(load_fast, tmp_path, quantization=QUANTIZATIONS[quantization](), dtype=dtype)


@pytest.mark.parametrize(
    "options",
    [{"quantize_lm_head": True}, {"quantize_embeddings": True}, {"modules_to_not_convert": ["layers.0.mlp"]}],
    ids=["lm_head", "embeddings", "modules_to_not_convert"],
)
@pytest.mark.parametrize("name", ["llama-gqa", "llama-mqa-tied"])
def test_options_of_what_is_quantized_hold(
    load_fast: Loader, tmp_path: Path, name: str, options: dict[str, Any]
) -> None:
    if name == "llama-mqa-tied" and "quantize_lm_head" in options:
        pytest.skip("refused: the embedding that it shares its weight with stays dense")
    decoder(name, torch.bfloat16, quantized=False).save_pretrained(tmp_path)
    assert_loads_the_same(load_fast, tmp_path, quantization=FourfoldConfig(**options), dtype=torch.bfloat16)


@pytest.mark.parametrize("quantization", ["16-bit", "nf4"])
def test_shards_load(load_fast: Loader, tmp_path: Path, quantization: str) -> None:
    decoder("llama-gqa", torch.bfloat16, quantized=False).save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert_loads_the_same(load_fast, tmp_path, quantization=QUANTIZATIONS[quantization](), dtype=torch.bfloat16)


@pytest.mark.parametrize("quantization", ["nf4", "plain-scales", "int8"])
def test_checkpoints_that_are_quantized_load(load_fast: Loader, tmp_path: Path, quantization: str) -> None:
    decoder("qwen2-biases", torch.bfloat16, quantized=False).save_pretrained(tmp_path / "dense")
    config = QUANTIZATIONS[quantization]()
    load_model(tmp_path / "dense", quantization=config, device="cpu").save_pretrained(tmp_path / "quantized")
    assert_loads_the_same(load_fast, tmp_path / "quantized", dtype=torch.float32)


@pytest.mark.parametrize("held_bytes", [reading_ahead.HELD_BYTES, 0])
@pytest.mark.parametrize("quantization", ["16-bit", "nf4"])
def test_weights_that_transformers_merges_of_several_load(
    load_fast: Loader, tmp_path: Path, quantization: str, held_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixtral's checkpoints hold each expert's matrices apart, the model one tensor of all."""
    monkeypatch.setitem(reading_ahead.ReadAhead.__init__.__kwdefaults__, "held_bytes", held_bytes)
    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=96,
        num_local_experts=3,
    )
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    assert any(".experts.2." in name for name in load_file(tmp_path / "model.safetensors"))
    assert_loads_the_same(load_fast, tmp_path, quantization=QUANTIZATIONS[quantization](), dtype=torch.float32)


def test_transposed_layers_load(load_fast: Loader, tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(n_embd=64, n_layer=2, n_head=2, vocab_size=96)).save_pretrained(tmp_path)
    assert_loads_the_same(load_fast, tmp_path, quantization=FourfoldConfig(), dtype=torch.float32)


@pytest.mark.parametrize("quantization", ["16-bit", "nf4"])
def test_smollm2_is_what_transformers_loads(load_fast: Loader, smollm2_path: Path, quantization: str) -> None:
    assert_loads_the_same(load_fast, smollm2_path, quantization=QUANTIZATIONS[quantization](), dtype=torch.bfloat16)


def test_what_is_generated_follows_the_folder(load_fast: Loader, tmp_path: Path) -> None:
    model = decoder("llama-gqa", quantized=False)
    model.generation_config.update(do_sample=True, temperature=0.25, max_new_tokens=7)
    model.save_pretrained(tmp_path)
    assert assert_loads_the_same(load_fast, tmp_path, dtype=torch.float32).generation_config.max_new_tokens == 7
    (tmp_path / "generation_config.json").unlink()
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "max_new_tokens": 9}))
    assert_loads_the_same(load_fast, tmp_path, dtype=torch.float32)


def test_it_is_saved_as_the_same_files_and_takes_adapters(load_fast: Loader, tmp_path: Path) -> None:
    decoder("llama-mqa-tied", torch.bfloat16, quantized=False).save_pretrained(tmp_path / "dense")
    options: dict[str, Any] = {"quantization": FourfoldConfig(), "dtype": torch.float32}
    models = {"fast": load_fast(tmp_path / "dense", **options)}
    models["slow"] = load_model(tmp_path / "dense", device="cpu", **options)
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)
    names = sorted(path.name for path in (tmp_path / "slow").iterdir())
    assert sorted(path.name for path in (tmp_path / "fast").iterdir()) == names
    for name in names:
        assert (tmp_path / "fast" / name).read_bytes() == (tmp_path / "slow" / name).read_bytes(), name
    peft = {name: adapted(model, fused=False) for name, model in models.items()}
    assert peft["fast"].peft_config["default"].base_model_name_or_path == str(tmp_path / "dense")
    with torch.no_grad():
        fast, slow = (peft[name](input_ids=ids()).logits for name in ("fast", "slow"))
    assert torch.equal(fast, slow)


def test_entries_that_the_model_does_not_have_are_passed_over(load_fast: Loader, tmp_path: Path) -> None:
    decoder("llama-gqa", quantized=False).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    tensors["vision.tower"] = torch.zeros(100)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_loads_the_same(load_fast, tmp_path, quantization=FourfoldConfig(), dtype=torch.float32)


def test_code_that_a_folder_names_is_not_run(load_fast: Loader, checkpoint: Path) -> None:
    change_config(checkpoint, auto_map={"AutoModelForCausalLM": "own.Model"})
    assert_loads_the_same(load_fast, checkpoint, quantization=FourfoldConfig(), dtype=torch.float32)


@pytest.mark.parametrize("source", ["embedding", "head"])
def test_a_tied_weight_is_found_under_either_name(load_fast: Loader, tmp_path: Path, source: str) -> None:
    decoder("llama-mqa-tied", quantized=False).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if source == "head":
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert_loads_the_same(load_fast, tmp_path, quantization=FourfoldConfig(), dtype=torch.float32)


# Faults.


@pytest.fixture
def checkpoint(tiny_llama: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


def change_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


KEYS = ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
CHANGES: dict[str, Callable[[dict[str, torch.Tensor], str], object]] = {
    "missing": lambda tensors, key: tensors.pop(key),
    "shape": lambda tensors, key: tensors.update({key: torch.zeros(3, 5)}),
    "nan": lambda tensors, key: tensors[key].view(-1)[5:6].fill_(float("nan")),
    "inf": lambda tensors, key: tensors[key].view(-1)[-1:].fill_(float("inf")),
}


@pytest.mark.parametrize("quantization", ["16-bit", "nf4"])
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_do_not_fit_are_refused_in_the_same_words(
    load_fast: Loader, checkpoint: Path, change: str, key: str, quantization: str
) -> None:
    change_weights(checkpoint, lambda tensors: CHANGES[change](tensors, key))
    options: dict[str, Any] = {"quantization": QUANTIZATIONS[quantization](), "dtype": torch.float32}
    with pytest.raises(FourfoldError, match=key) as wanted:
        load_model(checkpoint, device="cpu", **options)
    with pytest.raises(type(wanted.value)) as found:
        load_fast(checkpoint, **options)
    assert str(found.value) == str(wanted.value)


@pytest.mark.parametrize("quantization", ["16-bit", "nf4"])
def test_a_file_that_becomes_shorter_while_it_is_read_is_refused_by_name(
    load_fast: Loader, checkpoint: Path, quantization: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = loading.loadable_ahead

    def then_cut(folder: Path, config: Any) -> Any:
        stored = whole(folder, config)
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        return stored

    monkeypatch.setattr(loading, "loadable_ahead", then_cut)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is cut short"):
        load_fast(checkpoint, quantization=QUANTIZATIONS[quantization]())


def test_a_file_that_cannot_be_read_is_refused_by_name(
    load_fast: Loader, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> int:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(reading_ahead.os, "preadv", fail)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read[\s\S]*Input/output error"):
        load_fast(checkpoint, quantization=FourfoldConfig())


# What is loaded as ever.


def change_config(folder: Path, **entries: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **entries}))


def no_preadv(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(reading_ahead.os, "preadv")


def a_file_of_another_name(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_config(folder, transformers_weights="own.safetensors")
    shutil.copy(folder / "model.safetensors", folder / "own.safetensors")


def an_index_beside_the_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = load_file(folder / "model.safetensors").keys()
    index = {"weight_map": dict.fromkeys(names, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def an_unknown_dtype(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    change_weights(folder, lambda tensors: tensors.update(extra=torch.zeros(4).to(torch.float8_e4m3fn)))


def fsdp(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_loading, "is_fsdp_enabled", lambda: True)


@pytest.mark.parametrize(
    "reason", [no_preadv, a_file_of_another_name, an_index_beside_the_file, an_unknown_dtype, fsdp]
)
def test_what_cannot_be_read_ahead_is_loaded_as_ever(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, reason: Callable[..., None]
) -> None:
    wanted = load_model(checkpoint, device="cpu", quantization=FourfoldConfig(), dtype=torch.float32)
    reason(checkpoint, monkeypatch)
    monkeypatch.setattr(loading, "READ_AHEAD_FOR", ("cpu",))
    monkeypatch.setattr(loading, "load_ahead", None)
    model = load_model(checkpoint, device="cpu", quantization=FourfoldConfig(), dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), wanted.parameters(), strict=True))
