"""Answers on their way to the client: whole or as server-sent events, until it goes or its time is over."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from fourfold.serving.bodies import Body, Piece, merged
from fourfold.serving.errors import ApiError
from fourfold.serving.responses import usage_of
from fourfold.serving.runner import Answers

__all__ = ["ClientGoneError", "EventStream", "collect", "unless_gone"]

# A comment, which clients leave out, so that nothing between takes a waiting stream for dead.
_STILL_HERE, _STILL_HERE_SECONDS = b": waiting\n\n", 15.0
# For sending the last event, when a request's time is over.
_LAST_EVENT_SECONDS = 2.0

T = TypeVar("T")


class ClientGoneError(Exception):
    """The client has hung up."""


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, which ends where the client hangs up.

    Raises:
        ClientGoneError: It did.
    """
    working = asyncio.ensure_future(work)
    listening = asyncio.ensure_future(_hangs_up(receive))
    try:
        await asyncio.wait({working, listening}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGoneError
        return working.result()
    finally:
        for task in (working, listening):
            task.cancel()
        await asyncio.gather(working, listening, return_exceptions=True)


async def _hangs_up(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def collect(answers: Answers, deadline: float) -> list[Piece]:
    """Each choice as a whole.

    Raises:
        ApiError: The engine failed, or the time is over.
    """
    pieces = [Piece() for _ in answers.parts]
    try:
        async with asyncio.timeout_at(deadline):
            while any(piece.finish_reason is None for piece in pieces):
                for index, chunk in await answers.read():
                    pieces[index].add(chunk)
    except TimeoutError as error:
        raise _too_late() from error
    return pieces


class EventStream(Response):
    """Server-sent events, as OpenAI has them.

    Args:
        answers: What comes.
        body: Its form.
        deadline: When it must have ended, by the event loop's clock. A client that reads too slowly is cut off then.
        with_usage: Whether the number of tokens is told at the end.
    """

    media_type = "text/event-stream"

    def __init__(self, answers: Answers, body: Body, deadline: float, with_usage: bool) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._answers = answers
        self._body = body
        self._deadline = deadline
        self._with_usage = with_usage

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            async with asyncio.timeout_at(self._deadline + _LAST_EVENT_SECONDS):
                await unless_gone(receive, self._send(send))
        except (ClientGoneError, TimeoutError):
            pass  # without its end, the server closes the connection
        finally:
            self._answers.close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async for event in self._events():
            await send({"type": "http.response.body", "body": event, "more_body": True})
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})

    async def _events(self) -> AsyncIterator[bytes]:
        body, parts = self._body, self._answers.parts
        opening = [body.opening(index) for index in range(len(parts))]
        yield b"".join(_event(first) for first in opening if first is not None)
        num_left, num_tokens = len(parts), 0
        try:
            while num_left:
                pieces = await self._next()
                if pieces is None:
                    yield _STILL_HERE
                    continue
                num_tokens += sum(piece.num_tokens for piece in pieces.values())
                num_left -= sum(piece.finish_reason is not None for piece in pieces.values())
                events = (
                    _event(body.piece(index, piece))
                    for index, piece in pieces.items()
                    if piece.text or piece.logprobs or piece.finish_reason is not None
                )
                if joined := b"".join(events):
                    yield joined
        except ApiError as error:
            yield _event(error.body())
            return
        if self._with_usage:
            num_prompt = sum(len(part.request.prompt_ids) for part in parts)
            yield _event(body.usage(usage_of(num_prompt, num_tokens)))

    async def _next(self) -> dict[int, Piece] | None:
        """What has come; None where nothing has for a while."""
        now = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout_at(min(self._deadline, now + _STILL_HERE_SECONDS)):
                return merged(await self._answers.read())
        except TimeoutError as error:
            if asyncio.get_running_loop().time() >= self._deadline:
                raise _too_late() from error
            return None


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + _dumps(value).encode() + b"\n\n"


_dumps: Callable[[Any], str] = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode


def _too_late() -> ApiError:
    # Asked again, it would take as long.
    return ApiError(
        504,
        "the answer did not come within the server's time limit",
        kind="timeout_error",
        code="timeout",
        headers={"x-should-retry": "false"},
    )
