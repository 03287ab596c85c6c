from __future__ import annotations

from pathlib import Path

import pytest

from fourfold.errors import SaveError
from fourfold.files import clear_leftovers, partial_path, whole_folder, write_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(path: Path, text: str) -> None:
    with whole_folder(path) as partial:
        (partial / "file").write_text(text)


def test_an_interrupt_while_writing_leaves_the_former_folder_and_no_trace(tmp_path) -> None:
    write(tmp_path / "model", "old")

    def interrupted() -> None:
        with whole_folder(tmp_path / "model") as partial:
            (partial / "file").write_text("new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (tmp_path / "model" / "file").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_what_a_killed_process_left_half_written_is_cleared_away(tmp_path) -> None:
    partial_path(tmp_path / "model").mkdir()
    (partial_path(tmp_path / "model") / "half").write_text("...")
    write(tmp_path / "model", "new")
    assert names(tmp_path / "model") == ["file"]
    assert names(tmp_path) == ["model"]


def test_a_process_killed_between_the_two_renames_loses_nothing(tmp_path) -> None:
    write(tmp_path / "model", "old")
    (tmp_path / "model").rename(tmp_path / ".model.old")
    with pytest.raises(ZeroDivisionError), whole_folder(tmp_path / "model"):
        raise ZeroDivisionError
    assert (tmp_path / "model" / "file").read_text() == "old"


def test_a_rename_that_fails_brings_the_former_folder_back(tmp_path, monkeypatch) -> None:
    write(tmp_path / "model", "old")
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self == partial_path(tmp_path / "model"):
            raise OSError("no")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OSError, match="no"):
        write(tmp_path / "model", "new")
    assert (tmp_path / "model" / "file").read_text() == "old"
    assert names(tmp_path) == ["model"]


def test_parents_are_made_and_a_place_that_cannot_be_written_is_named(tmp_path) -> None:
    write(tmp_path / "a" / "b", "new")
    assert (tmp_path / "a" / "b" / "file").read_text() == "new"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SaveError, match=r"file/model cannot be written(.|\n)*found"):
        write(tmp_path / "file" / "model", "new")


def test_leftovers_of_a_killed_writer_go_and_what_it_moved_aside_comes_back(tmp_path) -> None:
    for left in (".a.partial", ".b.old", ".c.old", "c", ".theirs.old"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "file").write_text(left)
    (tmp_path / ".d.partial").write_text("half")
    clear_leftovers(tmp_path, lambda name: name in ("a", "b", "c", "d"))
    assert names(tmp_path) == [".theirs.old", "b", "c"]
    assert (tmp_path / "b" / "file").read_text() == ".b.old"
    assert (tmp_path / "c" / "file").read_text() == "c"


def test_a_text_that_cannot_be_written_leaves_the_former_one(tmp_path) -> None:
    path = tmp_path / "text"
    write_whole(path, "Zoë")
    assert path.read_text(encoding="utf-8") == "Zoë"
    with pytest.raises(UnicodeEncodeError):
        write_whole(path, "new \ud800")
    assert path.read_text(encoding="utf-8") == "Zoë"
