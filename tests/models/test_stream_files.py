"""Layers that are read from a checkpoint as they are needed."""

from __future__ import annotations

import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from decoders import adapted, ids, loss_and_grads
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from streamed import LAYERS, write_checkpoint
from torch import Tensor

from fourfold.errors import CheckpointError
from fourfold.kernels.host_memory import HostBuffer
from fourfold.models import stream_files
from fourfold.models.loading import load_model
from fourfold.models.preparing import prepare
from fourfold.models.stream_files import NUM_HOST_BUFFERS, DiskCopies, MappedFiles
from fourfold.models.stream_ring import Slot
from fourfold.models.streaming import stream_base, stream_of
from fourfold.quantization.hf_config import FourfoldConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama"), "llama-gqa")


def streaming_from(folder: Path) -> PeftModel:
    model = adapted(load_model(folder, dtype=torch.float32, device="cpu"), fused=True)
    stream_base(model, "cpu", source="disk")
    return model


def test_the_mapped_tensors_are_those_of_safetensors(folder: Path) -> None:
    files = MappedFiles(folder)
    expected = {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}
    assert files.tensors.keys() == expected.keys()
    assert all(torch.equal(files.tensors[name], value) for name, value in expected.items())


def test_from_disk_only_the_ring_and_what_is_in_no_file_is_in_memory(folder: Path) -> None:
    ours = streaming_from(folder)
    pieces = [piece for layer in stream_of(ours).ring.copies.layers for piece in layer]
    in_memory = [piece.num_bytes for piece in pieces if piece.place is None]
    # The offsets of double quantization, which stand in JSON.
    assert in_memory == [4] * (LAYERS * 7)
    assert stream_of(ours)._buffers == []


def test_the_disks_bandwidth_is_said_once(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "fourfold"):
        ours = streaming_from(folder)
        for _ in range(3):
            loss_and_grads(ours)
    said = [record.message for record in caplog.records if "GB/s" in record.message]
    assert len(said) == 1
    assert said[0].startswith("The base streams from /")


def reads_after(seconds: float) -> Any:
    """`os.preadv` of a disk that takes so long for each read."""
    read = os.preadv

    def preadv(*args: Any) -> int:
        time.sleep(seconds)
        return read(*args)

    return preadv


def test_a_run_that_waits_for_the_disk_hears_of_it_once_with_the_bandwidth(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = streaming_from(folder)
    monkeypatch.setattr(stream_files, "_BUSY_SECONDS", 0.0)
    # Whatever else this machine is busy with, and however slowly it computes meanwhile.
    monkeypatch.setattr(stream_files, "_BUSY_SHARE", 0.1)
    monkeypatch.setattr(stream_files.os, "preadv", reads_after(0.03))
    with caplog.at_level(logging.WARNING, "fourfold"):
        for _ in range(4):
            loss_and_grads(ours)
    (said,) = [record.message for record in caplog.records if "waits for the disk" in record.message]
    assert "MB/s" in said
    assert str(folder) in said


def test_a_disk_that_keeps_up_is_not_complained_of(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    ours = streaming_from(folder)
    with caplog.at_level(logging.WARNING, "fourfold"):
        for _ in range(4):
            loss_and_grads(ours)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_layer_that_is_long_in_coming_is_named_while_it_is_waited_for(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = streaming_from(folder)
    monkeypatch.setattr(stream_files, "_PATIENCE_SECONDS", 0.05)
    monkeypatch.setattr(stream_files.os, "preadv", reads_after(0.06))
    with caplog.at_level(logging.WARNING, "fourfold"), torch.no_grad():
        ours(ids())
    said = [record.message for record in caplog.records if "Still waiting for layer" in record.message]
    assert said[0].startswith(f"Still waiting for layer 0 from {folder}")


def test_a_disk_that_fails_ends_the_run_by_an_error_that_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> int:
        raise OSError(5, "Input/output error")

    ours = streaming_from(folder)
    monkeypatch.setattr(stream_files.os, "preadv", fail)
    with pytest.raises(CheckpointError, match=r"could not be read(.|\n)*Input/output error(.|\n)*resume"):
        loss_and_grads(ours)


def test_a_base_quantized_as_it_was_loaded_is_in_no_file_and_the_error_says_how_to_make_one(
    folder: Path,
) -> None:
    dense = folder / "dense"
    model = load_model(dense, quantization=FourfoldConfig(), dtype=torch.float32, device="cpu")
    with pytest.raises(CheckpointError, match=rf"fourfold quantize {dense} --out DIR"):
        stream_base(model, "cpu", source="disk")


def test_another_base_than_the_one_on_the_disk_is_refused_by_name(folder: Path) -> None:
    model = load_model(folder, dtype=torch.float32, device="cpu")
    prepared = prepare(model, LoraConfig(r=4), init_lora_weights="pissa", fused=False)
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.self_attn\.q_proj is not what(.|\n)*PiSSA"):
        stream_base(prepared, "cpu", source="disk")


def test_a_file_cut_short_while_it_streams_is_an_error(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("dense"))
    model = load_model(copy, dtype=torch.float32, device="cpu")
    stream_base(model, "cpu", source="disk")
    for parameter in model.parameters():
        if parameter.is_floating_point():
            # On a GPU it would be a copy; here it lies in the file, which is mapped.
            parameter.data = parameter.data.clone()
    for path in copy.glob("*.safetensors"):
        os.truncate(path, 4096)
    with pytest.raises(CheckpointError, match="cut short while the base streamed from it"):
        model(ids())


class Done:
    """An event that has come to pass."""

    waited = 0

    def synchronize(self) -> None:
        Done.waited += 1


class ThroughHostBuffers:
    """A copy to the device that has happened when it was asked for."""

    def copy(self, slot: Slot, source: Tensor) -> None:
        slot.buffer[: len(source)].copy_(source)
        source.fill_(255)
        slot.ready = cast(torch.cuda.Event, Done())

    def enter(self, slot: Slot) -> None:
        assert slot.ready is not None

    def leave(self, slot: Slot) -> None:
        assert slot.ready is not None


def test_a_host_buffer_is_filled_again_only_after_the_copy_from_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        stream_files, "HostBuffer", lambda size, **_: HostBuffer(size, pinned=False, purpose="layers from disk")
    )
    model, resident = streaming_from(folder), adapted(load_model(folder, dtype=torch.float32, device="cpu"), fused=True)
    stream = stream_of(model)
    plain = stream.ring.copies
    copies: Any = ThroughHostBuffers()
    stream.ring.copies = DiskCopies(plain.layers, plain.num_bytes, copies, plain.files)
    Done.waited = 0
    for _ in range(2):
        (loss, grads), (expected_loss, expected) = (loss_and_grads(each) for each in (model, resident))
        assert torch.equal(loss, expected_loss)
        assert all(torch.equal(grads[name], value) for name, value in expected.items())
    assert Done.waited == stream.ring.num_copies - NUM_HOST_BUFFERS > LAYERS
