"""Folders and files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from fourfold.errors import SaveError

__all__ = ["clear_leftovers", "partial_path", "whole_folder", "write_whole"]

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def partial_path(path: Path) -> Path:
    """Where `path` is being written until it is whole."""
    return path.with_name(f".{path.name}.partial")


@contextlib.contextmanager
def whole_folder(path: Path, *, hint: str = "free some space and run it again") -> Iterator[Path]:
    """A folder to write into that becomes `path` when the block ends, and leaves no trace if it fails.

    What stood at `path` stays whole until the new folder replaces it.

    Raises:
        SaveError: The disk is full, and the folder written so far is gone, so its space is free again; or nothing can
            be written there at all.
    """
    partial = partial_path(path)
    _bring_back(path)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise SaveError(f"{path} cannot be written", found=error.strerror, hint="choose another folder") from error
    try:
        yield partial
        _sync(partial)
        _replace(partial, path)
    except BaseException as error:
        written = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file())
        shutil.rmtree(partial, ignore_errors=True)
        if _is_disk_full(error):
            left = shutil.disk_usage(path.parent).free
            raise SaveError(
                f"The disk is full: {path} was not saved, and what was saved before it is untouched",
                found=f"{left:,} bytes free after removing the {written:,} bytes already written",
                hint=hint,
            ) from error
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a text file in UTF-8: whoever reads it, after a crash too, finds the old text or the new one."""
    partial = partial_path(path)
    with partial.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync_entry(path.parent)


def clear_leftovers(folder: Path, is_ours: Callable[[str], bool]) -> None:
    """Remove what a writer that was killed left half written in `folder`, and finish a replacement it had begun.

    Args:
        is_ours: Whether a name is that of a file or folder that is written whole here; others are left alone.
    """
    for left in (*folder.glob(".*.old"), *folder.glob(".*.partial")):
        path = left.with_name(left.stem.removeprefix("."))
        if not is_ours(path.name):
            continue
        _bring_back(path)
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink(missing_ok=True)


def _is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in _DISK_FULL
    # The Rust writers of safetensors and tokenizers put the number into the text.
    return any(f"os error {number}" in str(error) for number in _DISK_FULL)


def _sync(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with file.open("rb") as handle:
                os.fsync(handle.fileno())
    _sync_entry(folder)


def _sync_entry(folder: Path) -> None:
    """Flush the names in a folder, where the system lets a folder be opened (Windows does not)."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _replace(partial: Path, path: Path) -> None:
    aside = _aside(path)
    shutil.rmtree(aside, ignore_errors=True)
    if path.exists():
        path.rename(aside)
    try:
        partial.rename(path)
    except OSError:
        _bring_back(path)
        raise
    _sync_entry(path.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.old")


def _bring_back(path: Path) -> None:
    """Undo a replacement that stopped between its two renames."""
    if _aside(path).exists() and not path.exists():
        _aside(path).rename(path)
