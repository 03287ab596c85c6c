"""Where a study is kept: Optuna's journal in a file, which outlives a kill, or a database by its URL."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from fourfold.errors import CheckpointError, FourfoldError, SaveError

if TYPE_CHECKING:
    from optuna.storages import BaseStorage
    from optuna.storages.journal import JournalFileSymlinkLock

__all__ = ["open_storage", "reporting_storage"]


@contextlib.contextmanager
def reporting_storage(storage: str) -> Iterator[None]:
    """Turns what a storage fails by into an error that a person can act on.

    Raises:
        SaveError: It is locked by another program, or cannot be reached or written.
        CheckpointError: What it holds is no study.
    """
    import sqlalchemy.exc
    from optuna.exceptions import StorageInternalError

    try:
        yield
    except FourfoldError:
        raise
    except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
        cause = error.__cause__ if isinstance(error, StorageInternalError) and error.__cause__ else error
        said = str(getattr(cause, "orig", None) or cause).strip().splitlines()[0]
        if "locked" in said:
            raise SaveError(
                f"the study's storage is locked: {storage}",
                found=said,
                hint="end the program that holds it; trials that are finished are kept",
            ) from error
        if any(words in said for words in ("not a database", "malformed", "no such column", "no such table")):
            raise _corrupt(storage, said) from error
        raise SaveError(f"the study's storage does not work: {storage}", found=said) from error
    except OSError as error:
        if not _is_of(error, Path(storage).resolve()):
            raise
        raise SaveError(f"the study's storage cannot be used: {storage}", found=error.strerror or str(error)) from error


def _is_of(error: OSError, path: Path) -> bool:
    """Whether it is the journal, its lock or a folder above it that failed, and no file of a trial."""
    names = [Path(name) for name in (error.filename, error.filename2) if isinstance(name, str)]
    return any(name in path.parents or str(name).startswith(str(path)) for name in names)


def _corrupt(storage: str, found: str) -> CheckpointError:
    return CheckpointError(
        f"the study's storage is corrupt: {storage}",
        found=found,
        allowed="what fourfold tune wrote there, or nothing yet",
        hint="put a copy in its place, or name another storage; the trials' own folders are not touched",
    )


def open_storage(storage: str) -> BaseStorage:
    """Open a storage, or make one.

    Args:
        storage: A URL, with "://" in it, of a database; else the path of a journal.

    Raises:
        CheckpointError: It is corrupt.
        SaveError: It is locked or cannot be used, or the package that speaks to such a database is missing.
    """
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

    with reporting_storage(storage):
        if "://" in storage:
            try:
                return RDBStorage(storage)
            except ImportError as error:
                raise SaveError(f"the study's storage cannot be used: {storage}", found=str(error)) from error
            except (ValueError, RuntimeError) as error:
                raise _corrupt(storage, str(error).splitlines()[0]) from error
        # Absolute: the lock is a link to it, beside it. A lock whose holder was killed is broken after 30 seconds.
        path = Path(storage).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = JournalFileSymlinkLock(str(path))
        _require_journal(path)
        _mend(path, lock)
        return JournalStorage(JournalFileBackend(str(path), lock))


def _require_journal(path: Path) -> None:
    """Raises CheckpointError, naming the line, for a file that is no journal."""
    if not path.exists():
        return
    *whole, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(whole, start=1):
        try:
            is_entry = "op_code" in json.loads(line)
        except (ValueError, TypeError):
            is_entry = False
        if not is_entry:
            raise _corrupt(str(path), f"line {number}: {line[:60].decode(errors='replace')}")
    if not whole and path.stat().st_size:
        raise _corrupt(str(path), "no line of a journal")


def _mend(path: Path, lock: JournalFileSymlinkLock) -> None:
    """Cut off a last line that a crash left unfinished: the next one would be written behind it, and both be lost."""
    if not path.exists() or path.read_bytes()[-1:] in (b"", b"\n"):
        return
    lock.acquire()
    try:
        with path.open("r+b") as file:
            # Read anew: it may have been the last line of a writer that is alive.
            text = file.read()
            file.truncate(text.rfind(b"\n") + 1)
    finally:
        lock.release()
