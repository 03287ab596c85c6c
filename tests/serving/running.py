"""A real server in a thread of this process, and an engine that answers by a script."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import uvicorn

from fourfold.inference.engine import Engine
from fourfold.inference.requests import Chunk, FinishReason, Request, Sequence
from fourfold.serving import Served, ServerOptions, open_socket
from fourfold.serving.server import make_server

MESSAGES = [{"role": "user", "content": "Anna paid 6 euros."}]


class Running:
    """A server that answers on a free port."""

    def __init__(self, served: Served, options: ServerOptions, uvicorn_server: uvicorn.Server, port: int) -> None:
        self.served = served
        self.options = options
        self.uvicorn = uvicorn_server
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        self.models = list(served.models)
        self.runner = uvicorn_server.config.app.state.runner

    def post(self, path: str = "/v1/chat/completions", **fields: Any) -> httpx2.Response:
        body: dict[str, Any] = {"model": self.models[0]} | fields
        if "chat" in path:
            body.setdefault("messages", MESSAGES)
        return httpx2.post(self.url + path, json=body, timeout=60)

    def get(self, path: str) -> httpx2.Response:
        return httpx2.get(self.url + path, timeout=60)

    def wait_until_idle(self, seconds: float = 10.0) -> None:
        """Raises AssertionError where a slot or a place in the queue is still taken then."""
        engine = self.served.engine
        deadline = time.monotonic() + seconds
        while (self.runner.num_live, engine.free_slots, engine.waiting) != (0, engine.max_sequences, 0):
            assert time.monotonic() < deadline, (self.runner.num_live, engine.free_slots, engine.waiting)
            time.sleep(0.01)


@contextmanager
def running(served: Served, **options: Any) -> Iterator[Running]:
    """Serve on a free port until the block is left."""
    chosen = ServerOptions(**({"port": 0, "shutdown_timeout": 5} | options))
    ready = threading.Event()
    with open_socket(chosen) as listener:
        server = make_server(served, chosen, ready.set)
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True)
        thread.start()
        assert ready.wait(30)
        port = listener.getsockname()[1]
        yield Running(served, chosen, server, port)
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


class Scripted(Engine):
    """Gives each sequence "a ", "b ", ... by the step, as slowly as asked, and fails when it is told to.

    Args:
        engine: An engine whose tokenizer and vocabulary it shows.
        seconds: A step takes.
        num_slots: Sequences at a time.
        repeats: How often a token's text is repeated.

    Attributes:
        words: Texts of tokens, again and again.
        requests: What it was asked.
    """

    def __init__(self, engine: Engine, seconds: float = 0.0, num_slots: int = 2, repeats: int = 1) -> None:
        self.words = [f"{letter} " * repeats for letter in "abcdefghij"]
        self.requests: list[Request] = []
        self.max_sequences = num_slots
        self.tokenizer = engine.tokenizer
        self.step_of_model = engine.step_of_model
        self.stop_ids = engine.stop_ids
        self.max_length = engine.max_length
        self.seconds = seconds
        self.before_step: Callable[[], None] = lambda: None
        self.active: list[Sequence] = []
        self.queued: list[Sequence] = []
        self.num_steps = 0
        self.num_forgotten = 0

    @property
    def free_slots(self) -> int:
        return self.max_sequences - len(self.active)

    @property
    def waiting(self) -> int:
        return len(self.queued)

    @property
    def has_work(self) -> bool:
        return bool(self.active or self.queued)

    def submit(self, request: Request) -> Sequence:
        self.requests.append(request)
        self.queued.append(Sequence(request))
        return self.queued[-1]

    def forget(self) -> None:
        self.num_forgotten += 1

    def cancel(self, sequence: Sequence) -> None:
        for held in (self.active, self.queued):
            if sequence in held:
                held.remove(sequence)

    def step(self) -> list[Chunk]:
        self.num_steps += 1
        time.sleep(self.seconds)
        self.before_step()
        while self.queued and self.free_slots:
            self.active.append(self.queued.pop(0))
        chunks = []
        for sequence in list(self.active):
            place = len(sequence.token_ids)
            sequence.token_ids.append(place)
            sequence.first_token_at = sequence.first_token_at or time.monotonic()
            reason: FinishReason | None = "length" if place + 1 == sequence.request.max_new_tokens else None
            text = self.words[place % len(self.words)]
            chunks.append(Chunk(sequence, text, (place,), (), reason))
            if reason is not None:
                self.active.remove(sequence)
        return chunks
