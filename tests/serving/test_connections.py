"""Clients that go, read slowly or come too many; engines that fail: no slot stays taken, and the server goes on."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import pytest
from running import MESSAGES, Running, Scripted, running

from fourfold.errors import InferenceError
from fourfold.serving import Served


@pytest.fixture
def make(tiny_served: Served) -> Iterator[Callable[..., Running]]:
    """Starts a server over a scripted engine: `make(seconds=..., max_waiting=...)`."""
    open_servers = []

    def start(seconds: float = 0.0, num_slots: int = 2, repeats: int = 1, **options: Any) -> Running:
        engine = Scripted(tiny_served.engine, seconds, num_slots, repeats)
        context = running(Served(engine, {"m": None}), **options)
        open_servers.append(context)
        return context.__enter__()

    yield start
    for context in open_servers:
        context.__exit__(None, None, None)


def scripted(server: Running) -> Scripted:
    assert isinstance(server.served.engine, Scripted)
    return server.served.engine


def connect(server: Running, **fields: Any) -> socket.socket:
    """A request sent over a plain socket whose answer nobody has read yet."""
    body = json.dumps({"model": "m", "messages": MESSAGES} | fields).encode()
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.connect(("127.0.0.1", server.port))
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    return connection


def until(holds: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_a_client_that_hangs_up_frees_its_slot_at_once(make: Callable[..., Running], stream: bool) -> None:
    server = make(seconds=0.01)
    connection = connect(server, stream=stream, max_tokens=200)
    until(lambda: scripted(server).free_slots == 1)
    connection.close()
    server.wait_until_idle(seconds=1)
    assert scripted(server).num_steps < 150


def test_a_client_that_hangs_up_while_it_waits_gives_its_place_back(make: Callable[..., Running]) -> None:
    server = make(seconds=0.01, num_slots=1)
    first, second = connect(server, max_tokens=100), None
    until(lambda: scripted(server).free_slots == 0)
    second = connect(server, max_tokens=100)
    until(lambda: server.runner.num_live == 2)
    second.close()
    until(lambda: server.runner.num_live == 1, seconds=1)
    first.close()
    server.wait_until_idle()


def test_a_client_that_does_not_read_stalls_nobody_and_is_cut_off_in_time(make: Callable[..., Running]) -> None:
    server = make(repeats=50_000, request_timeout=1.5)  # 200 tokens are 20 MB, more than any buffer between
    with connect(server, stream=True, max_tokens=200) as lazy:
        until(lambda: server.runner.num_live == 0)  # it is generated all the same
        began = time.monotonic()
        assert server.post(max_tokens=3).status_code == 200
        assert time.monotonic() - began < 1
        until(lambda: not server.uvicorn.server_state.tasks, seconds=12)
        assert lazy.recv(15) == b"HTTP/1.1 200 OK"


def test_a_stream_past_its_time_ends_with_an_error(make: Callable[..., Running]) -> None:
    server = make(seconds=0.05, request_timeout=0.4)
    with httpx2.stream(
        "POST", f"{server.url}/v1/chat/completions", json={"model": "m", "messages": MESSAGES, "stream": True}
    ) as response:
        events = [line for line in response.iter_lines() if line]
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "timeout"
    assert events[-1] == "data: [DONE]"
    server.wait_until_idle(seconds=1)


def test_an_answer_past_its_time_is_a_504_that_is_not_to_be_asked_again(make: Callable[..., Running]) -> None:
    server = make(seconds=0.05, request_timeout=0.3)
    response = server.post()
    assert response.status_code == 504
    assert response.headers["x-should-retry"] == "false"
    server.wait_until_idle(seconds=1)


def test_more_than_may_wait_are_told_to_come_again(make: Callable[..., Running]) -> None:
    server = make(seconds=0.02, num_slots=1, max_waiting=2)
    with ThreadPoolExecutor(8) as pool:
        responses = list(pool.map(lambda _: server.post(max_tokens=20), range(8)))
    statuses = sorted(response.status_code for response in responses)
    assert statuses == [200] * 3 + [429] * 5
    refused = next(response for response in responses if response.status_code == 429)
    assert int(refused.headers["retry-after"]) > 0
    assert refused.json()["error"]["code"] == "queue_full"
    # All choices of a request or none.
    assert server.post(max_tokens=1, n=4).status_code == 429
    server.wait_until_idle()


def test_a_fault_of_the_engine_ends_what_ran_with_an_error_and_the_server_goes_on(make: Callable[..., Running]) -> None:
    server = make()

    def fail_once() -> None:
        if scripted(server).num_steps == 3:
            raise RuntimeError("secret details")

    scripted(server).before_step = fail_once
    response = server.post(max_tokens=50)
    assert response.status_code == 500
    assert "secret" not in response.text
    assert scripted(server).num_forgotten == 1
    assert server.post(max_tokens=5).status_code == 200
    assert server.get("/health").status_code == 200
    scripted(server).num_steps = 0
    with httpx2.stream(
        "POST",
        f"{server.url}/v1/completions",
        json={"model": "m", "prompt": "a", "stream": True, "max_tokens": 50},
    ) as stream:
        events = [line for line in stream.iter_lines() if line]
    assert json.loads(events[-2].removeprefix("data: "))["error"]["type"] == "server_error"
    server.wait_until_idle()


def test_an_engine_that_fails_again_and_again_is_told_by_health(make: Callable[..., Running]) -> None:
    server = make()

    def fail() -> None:
        raise RuntimeError

    scripted(server).before_step = fail
    assert [server.post(max_tokens=5).status_code for _ in range(4)] == [500, 500, 500, 503]
    assert server.get("/health").status_code == 503
    server.wait_until_idle()


def test_what_the_engine_refuses_is_the_requests_fault(make: Callable[..., Running], monkeypatch: Any) -> None:
    server = make()

    def refuse(_: object) -> None:
        raise InferenceError("too odd")

    monkeypatch.setattr(scripted(server), "submit", refuse)
    response = server.post(n=2)
    assert response.status_code == 400
    assert "too odd" in response.json()["error"]["message"]
    server.wait_until_idle()


def test_at_the_end_what_is_at_work_is_finished_and_nothing_new_begun(make: Callable[..., Running]) -> None:
    server = make(seconds=0.02)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(lambda: server.post(max_tokens=30))
        until(lambda: server.runner.num_live == 1)
        server.uvicorn.should_exit = True
        assert answer.result().json()["usage"]["completion_tokens"] == 30
    with pytest.raises(httpx2.TransportError):
        server.post(max_tokens=1)


def test_at_the_end_what_takes_too_long_is_broken_off(make: Callable[..., Running]) -> None:
    server = make(seconds=0.1, shutdown_timeout=1)
    failures = []

    def ask() -> None:
        try:
            failures.append(server.post(max_tokens=200).status_code)
        except httpx2.TransportError as error:
            failures.append(type(error))

    thread = threading.Thread(target=ask)
    thread.start()
    until(lambda: server.runner.num_live == 1)
    began = time.monotonic()
    server.uvicorn.should_exit = True
    thread.join(10)
    assert time.monotonic() - began < 5
    assert failures != [200]
    until(lambda: server.runner.num_live == 0)
