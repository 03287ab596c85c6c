from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from twins import original_model

from fourfold.errors import CheckpointError
from fourfold.models.checkpoint_files import (
    StoredTensor,
    check_checkpoint,
    check_gguf,
    check_safetensors,
    stored_tensors,
)


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    original_model().save_pretrained(tmp_path / "model", max_shard_size="50KB")
    return tmp_path / "model"


def shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[1]


def test_a_whole_checkpoint_passes(sharded: Path, tiny_llama: Path) -> None:
    check_checkpoint(sharded)
    check_checkpoint(tiny_llama)


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such folder"):
        check_checkpoint(tmp_path / "none")


def test_an_empty_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json is missing[\s\S]*an empty folder"):
        check_checkpoint(tmp_path)


def test_a_missing_configuration_is_refused(sharded: Path) -> None:
    (sharded / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        check_checkpoint(sharded)


def test_a_configuration_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="no weights"):
        check_checkpoint(tmp_path)


def test_a_missing_shard_is_refused_by_name(sharded: Path) -> None:
    missing = shard(sharded)
    missing.unlink()
    with pytest.raises(CheckpointError, match=rf"{missing.name} is missing"):
        check_checkpoint(sharded)


@pytest.mark.parametrize("keep", [0, 4, 40, -1])
def test_a_shard_that_was_cut_short_is_refused_by_name(sharded: Path, keep: int) -> None:
    cut = shard(sharded)
    cut.write_bytes(cut.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=rf"{cut.name} is cut short"):
        check_checkpoint(sharded)


def test_a_file_with_more_than_its_header_says_is_refused(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    with (tmp_path / "a.safetensors").open("ab") as file:
        file.write(b"more")
    with pytest.raises(CheckpointError, match="longer than its header says"):
        check_safetensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("header", [b"{not json", b"[1, 2]", b'{"a": 3}', b'{"a": {}}', b'{"a": {"data_offsets": []}}'])
def test_a_broken_header_is_refused(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="no readable header"):
        check_safetensors(tmp_path / "a.safetensors")


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}'])
def test_a_broken_index_is_refused(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json cannot be read"):
        check_checkpoint(sharded)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model.bin.index.json", "model.pt"])
def test_a_pickle_is_refused_and_not_opened(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"is a pickle[\s\S]*safetensors"):
        check_checkpoint(tmp_path)


def test_safetensors_beside_a_pickle_are_taken(sharded: Path) -> None:
    shutil.copy(shard(sharded), sharded / "pytorch_model.bin")
    check_checkpoint(sharded)


def with_header(folder: Path, **entry: Any) -> None:
    """One tensor of eight bytes beside four of another's, and what its header says of it instead."""
    whole = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **entry}
    header = {"a": {key: value for key, value in whole.items() if value is not None}}
    text = json.dumps({**header, "b": {"dtype": "U8", "shape": [4], "data_offsets": [8, 12]}}).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))


def test_stored_tensors_are_where_the_header_says(tmp_path: Path) -> None:
    with_header(tmp_path)
    found = stored_tensors(tmp_path)
    assert found is not None
    path = tmp_path / "model.safetensors"
    start = path.stat().st_size - 12
    assert found["a"] == StoredTensor(path, start, 8, torch.float32, "F32", (2,))
    assert found["b"] == StoredTensor(path, start + 8, 4, torch.uint8, "U8", (4,))


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F8_E4M3"},
        {"dtype": None},
        {"dtype": []},
        {"shape": [3]},
        {"shape": ["2"]},
        {"shape": None},
        {"data_offsets": [0, 9]},
        {"data_offsets": [4, 12]},
        {"data_offsets": [0, 4], "shape": [1]},
        {"data_offsets": [-8, 0]},
    ],
    ids=str,
)
def test_headers_that_are_not_understood_are_left_to_safetensors(tmp_path: Path, entry: dict[str, Any]) -> None:
    with_header(tmp_path, **entry)
    assert stored_tensors(tmp_path) is None


def test_a_gguf_file_that_is_missing_or_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        check_gguf(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("these are no weights, and more than a header has" * 3)
    with pytest.raises(CheckpointError, match=r"text\.gguf is no GGUF file"):
        check_gguf(tmp_path / "text.gguf")
