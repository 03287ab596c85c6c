"""The thread that drives the engine, and how answers come from it to the requests that wait for them.

One thread alone calls the engine. Requests hand it commands through a queue; what its steps give it hands to the event
loop, all of them in one call. Neither ever waits for the other: what a client does not read yet is kept, at most as
many tokens as it asked for.

An event costs the loop some 50 microseconds, and the engine waits for the interpreter meanwhile. So where steps are
short, what several gave goes out together: a stream has an event every millisecond for each that runs, so that the loop
takes a twentieth of the time, however many there are. First and last tokens never wait.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from fourfold.errors import FourfoldError
from fourfold.inference.engine import Engine
from fourfold.inference.requests import Chunk, Request
from fourfold.inference.requests import Sequence as Running
from fourfold.serving.errors import ApiError

__all__ = ["Answer", "Answers", "Runner"]

logger = logging.getLogger(__name__)

# So many steps in a row that fail, each with nothing between that succeeded, and the engine is taken for lost.
_MOST_FAULTS = 3
# Between the events of a stream at least, for each that runs.
_SECONDS_A_STREAM = 0.001


class Answer:
    """One sequence that a request waits for."""

    def __init__(self, request: Request, index: int, answers: Answers) -> None:
        self.request = request
        self.index = index
        self.answers = answers
        # The runner's own: what the engine calls it, whether it still has its place, and whether any of it has come.
        self.running: Running | None = None
        self.is_live = True
        self.has_begun = False


class Answers:
    """All that one request waits for, on the side of the event loop.

    Args:
        runner: Where they run.
        requests: What the engine is asked.
    """

    def __init__(self, runner: Runner, requests: Sequence[Request]) -> None:
        self.loop = asyncio.get_running_loop()
        self.submitted = time.monotonic()
        self._runner = runner
        self._arrived: deque[tuple[int, Chunk | ApiError]] = deque()
        self._wake = asyncio.Event()
        self.parts = [Answer(request, index, self) for index, request in enumerate(requests)]

    async def read(self) -> list[tuple[int, Chunk]]:
        """Index and chunk of all that has come since the last call; waits until there is something.

        The last chunk of each has a finish reason; after those there is nothing to wait for.

        Raises:
            ApiError: The engine refused a request, or failed.
        """
        await self._wake.wait()
        chunks: list[tuple[int, Chunk]] = []
        while self._arrived:
            index, first = self._arrived[0]
            if isinstance(first, ApiError):
                if chunks:
                    return chunks
                raise first
            chunks.append((index, first))
            self._arrived.popleft()
        self._wake.clear()
        return chunks

    def close(self) -> None:
        """Free the slots of those that have not ended."""
        for answer in self.parts:
            self._runner.cancel(answer)

    def deliver(self, index: int, arrived: Chunk | ApiError) -> None:
        """Called by the event loop."""
        self._arrived.append((index, arrived))
        self._wake.set()


class Runner:
    """Drives an engine in a thread of its own.

    Args:
        engine: The engine; nothing else may call it from `start` on.
        num_slots: Sequences that the engine runs at a time.
        max_waiting: Sequences that may wait beside those.
        observe: Called in the runner's thread with each answer's chunk.
        clock: Seconds.
    """

    def __init__(
        self,
        engine: Engine,
        num_slots: int,
        max_waiting: int,
        observe: Callable[[Answer, Chunk], None] = lambda _answer, _chunk: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._engine = engine
        self._most = num_slots + max_waiting
        self._observe = observe
        self._clock = clock
        # What steps gave since the last call to the event loop, which was then.
        self._kept: list[tuple[Answer, Chunk | ApiError]] = []
        self._given_at = clock()
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._answers: dict[Running, Answer] = {}
        self._num_live = 0
        self._lock = threading.Lock()
        self._is_stopping = False
        self._faults = 0
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    # -- called by the event loop --

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End what runs, and the thread."""
        self._is_stopping = True
        self._commands.put(lambda: None)
        self._thread.join()

    @property
    def num_live(self) -> int:
        """Sequences that run or wait."""
        return self._num_live

    @property
    def is_failed(self) -> bool:
        """Whether the engine answers no more."""
        return self._faults >= _MOST_FAULTS or not (self._thread.is_alive() or self._thread.ident is None)

    def require_room(self, count: int) -> None:
        """Raises ApiError where so many sequences have no place: 429 where too many wait, 503 where the server ends or
        the engine has failed."""
        if self.is_failed:
            raise ApiError(503, "the engine has failed; see the server's log", kind="server_error")
        if self._is_stopping:
            raise ApiError(503, "the server is ending", kind="server_error", headers={"Retry-After": "5"})
        if self._num_live + count > self._most:
            raise ApiError(
                429,
                f"too many requests wait: {self._num_live} of {self._most} places are taken",
                kind="rate_limit_error",
                code="queue_full",
                headers={"Retry-After": "1"},
            )

    def submit(self, requests: Sequence[Request]) -> Answers:
        """Hand requests to the engine, all or none.

        Raises:
            ApiError: As `require_room`.
        """
        with self._lock:
            self.require_room(len(requests))
            self._num_live += len(requests)
        answers = Answers(self, requests)
        for answer in answers.parts:
            self._commands.put(lambda answer=answer: self._begin(answer))  # type: ignore[misc]
        return answers

    def cancel(self, answer: Answer) -> None:
        """Free an answer's slot, if it has not ended."""
        if answer.is_live:
            self._commands.put(lambda: self._cancel(answer))

    # -- the thread --

    def _run(self) -> None:
        while not self._is_stopping:
            self._take_commands()
            if self._engine.has_work and not self._is_stopping:
                self._step()
        self._take_commands()
        for answer in list(self._answers.values()):
            self._cancel(answer)
            self._give([(answer, ApiError(503, "the server is ending", kind="server_error"))])

    def _take_commands(self) -> None:
        """All that are there; waits for one where the engine has nothing to do."""
        block = not self._engine.has_work and not self._is_stopping
        while True:
            try:
                command = self._commands.get(block)
            except queue.Empty:
                return
            command()
            block = False

    def _begin(self, answer: Answer) -> None:
        try:
            answer.running = self._engine.submit(answer.request)
        except FourfoldError as error:
            self._end(answer)
            self._give([(answer, ApiError(400, str(error)))])
        except Exception:
            logger.exception("the engine did not take a request")
            self._end(answer)
            self._give([(answer, _fault())])
        else:
            self._answers[answer.running] = answer

    def _cancel(self, answer: Answer) -> None:
        if not answer.is_live:
            return
        self._end(answer)
        if answer.running is not None:
            self._engine.cancel(answer.running)

    def _end(self, answer: Answer) -> None:
        """Forget an answer; its place is free."""
        answer.is_live = False
        if answer.running is not None:
            self._answers.pop(answer.running, None)
        with self._lock:
            self._num_live -= 1

    def _step(self) -> None:
        try:
            chunks = self._engine.step()
        except Exception:
            self._faults += 1
            logger.exception("a step of the engine failed")
            self._drop_all()
            return
        self._faults = 0
        is_urgent = False
        for chunk in chunks:
            answer = self._answers.get(chunk.sequence)
            if answer is None:
                continue  # cancelled meanwhile
            is_urgent |= chunk.finish_reason is not None or not answer.has_begun
            answer.has_begun = True
            if chunk.finish_reason is not None:
                self._end(answer)
            self._observe(answer, chunk)
            self._kept.append((answer, _failure(chunk) or chunk))
        if is_urgent or self._clock() - self._given_at >= _SECONDS_A_STREAM * len(self._answers):
            self._give([])

    def _drop_all(self) -> None:
        """After a fault nobody knows what the running sequences' caches hold."""
        self._engine.forget()
        for answer in list(self._answers.values()):
            try:
                self._cancel(answer)
            except Exception:
                logger.exception("a sequence could not be cancelled")
                self._faults = _MOST_FAULTS
            self._give([(answer, _fault())])

    def _give(self, last: list[tuple[Answer, Chunk | ApiError]]) -> None:
        """To the event loop: what was kept, then these."""
        given = self._kept + last
        self._kept, self._given_at = [], self._clock()
        if not given:
            return
        try:
            # One loop serves all requests.
            given[0][0].answers.loop.call_soon_threadsafe(_deliver_all, given)
        except RuntimeError:
            logger.debug("the event loop has ended before an answer")


def _deliver_all(given: list[tuple[Answer, Chunk | ApiError]]) -> None:
    for answer, arrived in given:
        answer.answers.deliver(answer.index, arrived)


def _failure(chunk: Chunk) -> ApiError | None:
    """What a sequence ended by that has no answer."""
    if chunk.finish_reason not in ("error", "cancelled"):
        return None
    said = chunk.sequence.error or f"the answer was {chunk.finish_reason}"
    return ApiError(500, said, kind="server_error")


def _fault() -> ApiError:
    return ApiError(500, "the engine failed while it answered; see the server's log", kind="server_error")
