"""What holds processes together, with two of them in one: threads over a real store."""

from __future__ import annotations

import os
import socket
import threading
import time

import pytest
from torch import distributed

from fourfold.errors import TrainingError
from fourfold.training import lifeline
from fourfold.training.lifeline import Lifeline
from fourfold.training.processes import Processes


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch):
    """Two that are alive, and what each was given up with; their beats are quick."""
    monkeypatch.setattr(lifeline, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(lifeline, "SILENCE_SECONDS", 1.0)
    monkeypatch.setattr(lifeline, "GRACE_SECONDS", 0.3)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    store = distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    given_up: list[list[int]] = [[], []]
    made = [Lifeline(Processes(rank, rank, 2, 2), given_up[rank].append) for rank in (0, 1)]
    for each in made:
        each.start()
    yield made, given_up
    for each in made:
        each._stop.set()
        each._thread.join()
    del store


def wait_for(holds, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_process_that_falls_silent_is_named_and_the_other_ends(pair, capsys):
    (first, second), given_up = pair
    second._stop.set()
    wait_for(lambda: given_up[0])
    assert given_up == [[1], []]
    assert "rank 1 on" in capsys.readouterr().err
    assert first._get("failed")["what"].startswith("nothing was heard of it for")


def test_a_process_of_this_machine_that_is_gone_is_found_at_once(pair, capsys):
    (_, second), given_up = pair
    second._stop.set()
    gone = 2**22 + 1  # above any process id
    second._set("about/1", {"host": socket.gethostname(), "pid": gone})
    wait_for(lambda: given_up[0])
    assert f"rank 1 on {socket.gethostname()} has died: process {gone} is gone" in capsys.readouterr().err


def test_a_process_that_has_ended_as_it_should_is_not_missed(pair):
    (_, second), given_up = pair
    second.close()
    time.sleep(1.5)
    assert given_up == [[], []]


@pytest.mark.parametrize("end", [Lifeline.close, lambda own: own.failed(TrainingError("the disk is full"))])
def test_none_is_in_the_store_any_more_when_its_process_ends(pair, end):
    """Python would abort it there, and torchrun end the others."""
    for each in pair[0]:
        end(each)
        assert not each._thread.is_alive()


def test_an_error_of_one_process_ends_the_other_and_is_told_there(pair, capsys):
    (_, second), given_up = pair
    assert second.failed(TrainingError("the disk of this machine is full")) is None
    wait_for(lambda: given_up[0])
    assert "failed (TrainingError): the disk of this machine is full" in capsys.readouterr().err


def test_an_error_that_follows_from_anothers_is_told_as_that(pair):
    (first, second), _ = pair
    failing = threading.Thread(target=second.failed, args=(TrainingError("rows are gone"),))
    failing.start()
    instead = first.failed(RuntimeError("Connection closed by peer"))
    failing.join()
    assert isinstance(instead, TrainingError)
    assert "rank 1 on" in str(instead)
    assert "rows are gone" in str(instead)


def test_a_fault_that_all_find_is_told_by_the_main_process_alone(pair):
    (first, second), _ = pair
    errors = [TrainingError("no such file"), TrainingError("no such file")]
    later = threading.Thread(target=first.failed, args=(errors[0],))
    later.start()
    second.failed(errors[1])
    later.join()
    assert [error.is_told for error in errors] == [False, True]


def test_the_main_process_goes_first(pair):
    (first, second), _ = pair
    order: list[str] = []

    def other() -> None:
        with second.main_first():
            order.append("other")

    waiting = threading.Thread(target=other)
    waiting.start()
    with first.main_first():
        time.sleep(0.3)
        order.append("main")
    waiting.join()
    assert order == ["main", "other"]


def test_of_one_process_there_is_nothing_to_watch(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    alone = Lifeline(Processes(), os._exit)
    alone.start()
    with alone.main_first():
        pass
    assert alone._thread is None
    assert alone.failed(RuntimeError("x")) is None
    alone.close()
