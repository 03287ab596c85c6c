"""What holds the processes of a run together: none goes on when another has failed or died.

A collective waits for all. Of a process that is gone nobody tells the others: they wait until the collective's timeout,
and what they say then names no rank. So each process has a thread that, every other second, writes a number into the
store by which the processes found each other (torch's TCPStore), looks at that of the next process, and at a key where
whoever finds a fault says so. A process that has died is found by its number, which stays as it is, or on the same
machine by its process id; one that fails says so itself, with its error. Then all end, within a minute.

What takes long on one process alone, such as preparing rows, disturbs none of this: the thread goes on writing.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

from fourfold.errors import FourfoldError, TrainingError
from fourfold.training.processes import Processes

__all__ = ["Lifeline"]

BEAT_SECONDS = 2.0
# Longer than anything keeps a thread from running.
SILENCE_SECONDS = 30.0
# What a process that fails waits for the main one to fail alike; three times as long, where its error may follow from
# another's.
GRACE_SECONDS = 3.0


class Lifeline:
    """The thread, and what waits for other processes by the store.

    Args:
        own: This process among the others.
        give_up: Ends this process; it may be waiting in a collective that never ends.
    """

    def __init__(self, own: Processes, give_up: Callable[[int], Any] = os._exit) -> None:
        self.own = own
        self._give_up = give_up
        self._stop = threading.Event()
        self._waits = 0
        self._thread: threading.Thread | None = None
        self._store: Any = None

    def start(self) -> None:
        """Begin to watch; nothing where there is one process, or no address of a store."""
        address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
        if not self.own.are_several or address is None or port is None:
            return
        # Of each attempt of torchrun's its own keys.
        attempt = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        client = TCPStore(address, int(port), is_master=False, timeout=timedelta(seconds=SILENCE_SECONDS))
        self._store = PrefixStore(f"fourfold/{attempt}", client)
        self._set(f"about/{self.own.rank}", {"host": socket.gethostname(), "pid": os.getpid()})
        self._thread = threading.Thread(target=self._watch, name="lifeline", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """This process has ended as it should."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):
                self._set(f"done/{self.own.rank}", {})
        self.stop()

    def stop(self) -> None:
        """Watch no more. A thread that is in the store while Python ends aborts the process, and torchrun then ends the
        others, the main one as it writes what was trained."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(SILENCE_SECONDS)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """What the main process does before the others, which then find what it left."""
        self._waits += 1
        key = f"first/{self._waits}"
        if not self.own.is_main:
            self._wait_for(key)
        yield
        if self.own.is_main and self._store is not None:
            self._set(key, {})

    def failed(self, error: BaseException) -> FourfoldError | None:
        """Tell the others of an error that ends this process.

        Returns:
            What to raise in its place: for an error that followed from another process's, that one's; None: `error`.
            A fault that the main process finds alike is `told` there.
        """
        if self._store is None:
            return None
        with contextlib.suppress(RuntimeError):
            if not isinstance(error, FourfoldError):
                first = self._found("failed", 3 * GRACE_SECONDS)
                if first is not None and first["rank"] != self.own.rank:
                    self.stop()
                    return _of_another(first, error)
            record = {"rank": self.own.rank, "type": type(error).__name__, "what": str(error), "host": _host()}
            if self.own.is_main:
                self._set("main", record)
            else:
                told = self._found("main", GRACE_SECONDS)
                if told is not None and told["what"] == record["what"]:
                    self.stop()
                    if isinstance(error, FourfoldError):
                        error.is_told = True
                    return None
            self.stop()
            self._set("failed", record)
        return None

    def _watch(self) -> None:
        watched = (self.own.rank + 1) % self.own.count
        seen, since, beat = b"", time.monotonic(), 0
        while not self._stop.wait(BEAT_SECONDS):
            beat += 1
            try:
                self._store.set(f"beat/{self.own.rank}", str(beat))
                failed = self._get("failed")
                if failed is None and not self._store.check([f"done/{watched}"]):
                    key = f"beat/{watched}"
                    now = self._store.get(key) if self._store.check([key]) else b""
                    if now != seen:
                        seen, since = now, time.monotonic()
                    about = self._get(f"about/{watched}") or {}
                    silent = time.monotonic() - since
                    if silent > SILENCE_SECONDS or _has_gone(about):
                        failed = {"rank": watched, "type": "died", "what": _death(about, silent), **about}
                        self._set("failed", failed)
            except RuntimeError:
                failed = {"rank": 0, "type": "died", "what": "the store of rank 0's machine is gone"}
            if failed is not None and not self._stop.wait(2 * GRACE_SECONDS if failed["type"] != "died" else 0):
                # Still here: whatever the process is doing, it waits for what will not come.
                if self.own.rank == (1 if failed["rank"] == 0 else 0):
                    sys.stderr.write(f"{_told(failed)}; all other processes end\n")
                    sys.stderr.flush()
                self._give_up(1)
                return

    def _wait_for(self, key: str) -> None:
        # In short waits: the main process may take long, and if it dies, the thread ends this one.
        while self._store is not None and not self._store.check([key]):
            time.sleep(0.1)

    def _found(self, key: str, seconds: float) -> dict[str, Any] | None:
        deadline = time.monotonic() + seconds
        while (found := self._get(key)) is None and time.monotonic() < deadline:
            time.sleep(0.1)
        return found

    def _get(self, key: str) -> dict[str, Any] | None:
        return json.loads(self._store.get(key)) if self._store.check([key]) else None

    def _set(self, key: str, record: dict[str, Any]) -> None:
        self._store.set(key, json.dumps(record))


def _host() -> str:
    return socket.gethostname()


def _has_gone(about: dict[str, Any]) -> bool:
    """Whether a process of this machine is no more; of another machine nothing is known."""
    if about.get("host") != _host():
        return False
    try:
        os.kill(about["pid"], 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


def _death(about: dict[str, Any], silent: float) -> str:
    if _has_gone(about):
        return f"process {about['pid']} is gone"
    return f"nothing was heard of it for {silent:.0f} seconds"


def _told(failed: dict[str, Any]) -> str:
    verb = "has died" if failed["type"] == "died" else f"failed ({failed['type']})"
    return f"rank {failed['rank']} on {failed.get('host', 'its machine')} {verb}: {failed['what']}"


def _of_another(failed: dict[str, Any], error: BaseException) -> TrainingError:
    return TrainingError(
        _told(failed),
        found=f"{type(error).__name__} in what it was waited for: {str(error).splitlines()[0] if str(error) else ''}",
        hint="the newest checkpoint is whole: `--resume_from_checkpoint auto` goes on from it",
    )
