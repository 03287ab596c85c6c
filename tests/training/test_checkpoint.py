from __future__ import annotations

import errno
import os
import resource
from pathlib import Path

import pytest
import tiny
import torch
from peft import PeftModel

from fourfold.errors import CheckpointError, ConfigError, SaveError
from fourfold.files import whole_folder
from fourfold.training.checkpoint import (
    check_checkpoint,
    find_checkpoint,
    list_checkpoints,
    prune_checkpoints,
)


def run(folder: Path, resume: str | Path | None = None, dropout: float = 0.1, r: int = 4, **options):
    """Eight steps of two microbatches over an epoch of four: each checkpoint at 3 is in mid-epoch."""
    model = tiny.peft_model(dropout=dropout, r=r)
    trainer = tiny.trainer(folder, model, **{"max_steps": 8, "gradient_accumulation_steps": 2, **options})
    trainer.train(resume_from_checkpoint=resume)
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    return losses, tiny.adapter_weights(model)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("run")
    losses, weights = run(folder, save_strategy="steps", save_steps=3, save_total_limit=None)
    return folder, losses, weights


@pytest.mark.parametrize("step", [3, 6])
def test_resumed_run_is_bit_for_bit_the_uninterrupted_one(finished, tmp_path: Path, step: int) -> None:
    folder, losses, weights = finished
    resumed_losses, resumed_weights = run(tmp_path, resume=folder / f"checkpoint-{step}")
    assert resumed_losses == losses
    assert all(torch.equal(resumed_weights[name], weights[name]) for name in weights)


@pytest.mark.parametrize("optim", ["adamw_8bit", "adamw_torch", "adafactor", "paged_adamw_32bit", "paged_lion_8bit"])
def test_resumed_run_is_the_uninterrupted_one_with_every_kind_of_state(tmp_path: Path, optim: str) -> None:
    losses, weights = run(tmp_path / "whole", optim=optim, r=64, save_strategy="steps", save_steps=3)
    resumed = run(tmp_path / "resumed", resume=tmp_path / "whole" / "checkpoint-6", optim=optim, r=64)
    assert resumed[0] == losses
    assert all(torch.equal(resumed[1][name], weights[name]) for name in weights)


def test_checkpoint_of_another_kind_of_state_is_refused(tmp_path: Path) -> None:
    run(tmp_path, r=64, save_strategy="steps", save_steps=3, max_steps=3)
    with pytest.raises(CheckpointError, match="optimizer's state of parameter 0 does not fit"):
        run(tmp_path, resume="auto", optim="adamw_8bit", r=64)


def test_checkpoint_past_max_steps_is_refused_rather_than_passed_over(finished, tmp_path: Path) -> None:
    folder, _, _ = finished
    with pytest.raises(ConfigError, match=r"checkpoint-6 is past max_steps(.|\n)*step 6, max_steps 4"):
        run(tmp_path, resume=folder / "checkpoint-6", max_steps=4)


def test_checkpoint_holds_safetensors_and_text_only(finished) -> None:
    folder, _, _ = finished
    names = {file.suffix for file in (folder / "checkpoint-3").rglob("*")}
    assert names <= {".safetensors", ".json", ".jinja", ".md"}
    assert not list(folder.glob(".*"))


def test_checkpoint_loads_in_plain_peft(finished) -> None:
    folder, _, weights = finished
    loaded = PeftModel.from_pretrained(tiny.base_model(), folder / "checkpoint-8")
    for name, value in loaded.named_parameters():
        if name in weights:
            assert torch.equal(value, weights[name])


def copy_of(folder: Path, tmp_path: Path) -> Path:
    target = tmp_path / folder.name
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "optimizer.safetensors", "trainer_state.json"])
def test_missing_and_cut_files_are_named(finished, tmp_path: Path, name: str) -> None:
    checkpoint = copy_of(finished[0] / "checkpoint-3", tmp_path)
    whole = (checkpoint / name).read_bytes()
    (checkpoint / name).write_bytes(whole[:-1])
    with pytest.raises(CheckpointError, match=f"not whole: .*{name} is not as it was written"):
        check_checkpoint(checkpoint)
    (checkpoint / name).unlink()
    with pytest.raises(CheckpointError, match=f"not whole: .*{name} is missing"):
        check_checkpoint(checkpoint)


def test_half_written_checkpoint_is_passed_over_for_the_one_before(finished, tmp_path: Path) -> None:
    copy_of(finished[0] / "checkpoint-3", tmp_path)
    newest = copy_of(finished[0] / "checkpoint-6", tmp_path)
    (newest / "manifest.json").unlink()
    assert find_checkpoint(tmp_path, "auto") == tmp_path / "checkpoint-3"
    (tmp_path / "checkpoint-3" / "optimizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint-6.*manifest\.json is missing"):
        find_checkpoint(tmp_path, "auto")


def test_auto_starts_anew_where_there_is_no_checkpoint_and_a_path_must_exist(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path, "auto") is None
    assert find_checkpoint(tmp_path / "absent", "auto") is None
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*checkpoint-9"):
        find_checkpoint(tmp_path, tmp_path / "checkpoint-9")


def test_pickle_is_refused(finished, tmp_path: Path) -> None:
    checkpoint = copy_of(finished[0] / "checkpoint-3", tmp_path)
    (checkpoint / "adapter_model.safetensors").unlink()
    torch.save({}, checkpoint / "adapter_model.bin")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is a pickle"):
        find_checkpoint(tmp_path, checkpoint)


def test_checkpoint_of_another_rank_is_refused_by_name(finished, tmp_path: Path) -> None:
    trainer = tiny.trainer(tmp_path, tiny.peft_model(r=2), max_steps=8)
    with pytest.raises(CheckpointError, match=r"other adapters(.|\n)*lora_A(.|\n)*\[2, 64\]"):
        trainer.train(resume_from_checkpoint=finished[0] / "checkpoint-3")


def test_full_disk_leaves_the_former_checkpoint_whole_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path, max_steps=3, save_strategy="steps", save_steps=3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # A limit on the size of a file makes every writer fail as a full disk does, the Rust ones too.
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(SaveError, match=r"The disk is full: .*checkpoint-6(.|\n)*bytes free") as error:
            run(tmp_path, resume="auto", save_strategy="steps", save_steps=3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "resume from" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-3"]
    check_checkpoint(tmp_path / "checkpoint-3")


def test_disk_that_fills_while_syncing_leaves_no_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "adapter"
    with whole_folder(target) as partial:
        (partial / "file").write_text("old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SaveError, match="disk is full"), whole_folder(target) as partial:
        (partial / "file").write_text("new")
    assert (target / "file").read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    for text in ("old", "new"):
        with whole_folder(target) as partial:
            (partial / text).write_text(text)
    assert [path.name for path in target.iterdir()] == ["new"]
    with pytest.raises(IsADirectoryError), whole_folder(target) as partial:
        partial.write_text("half-way through, something fails")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]


def test_only_the_newest_checkpoints_are_kept(tmp_path: Path) -> None:
    for step in (9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    (tmp_path / "checkpoint-best").mkdir()
    prune_checkpoints(tmp_path, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-100"]
