"""What stands before the endpoints: keys, hosts, and the body's size and time. Plain ASGI, so that streams pass."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fourfold.serving.errors import ApiError
from fourfold.serving.options import ServerOptions

__all__ = ["Guard"]

# What tells nothing of anybody: the page, and whether the server is well.
_OPEN = {"/", "/health"}
_LOOPBACK_HOSTS = {"localhost", "127.0.0.1", "::1"}


class Guard:
    """Middleware.

    Args:
        app: What it stands before.
        options: Keys and limits.
        count: Called with path and status of each request that was answered.
    """

    def __init__(self, app: ASGIApp, options: ServerOptions, count: Callable[[str, int], None]) -> None:
        self._app = app
        self._options = options
        self._count = count
        self._keys = [key.encode() for key in options.api_keys]
        # Who knows a key is no page of another site; and what is reached from outside has names that we do not know.
        self._hosts = None if self._keys or not options.is_loopback else _LOOPBACK_HOSTS | set(options.allowed_hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path: str = scope["path"]

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._count(path, message["status"])
            await send(message)

        try:
            headers = Headers(scope=scope)
            self._check_host(headers)
            if path not in _OPEN:
                self._check_key(headers)
            body = await self._body(headers, receive)
        except ApiError as error:
            await error.response()(scope, receive, counted)
            return
        await self._app(scope, _again(body, receive), counted)

    def _check_host(self, headers: Headers) -> None:
        host = headers.get("host", "")
        name = host.partition("]")[0].removeprefix("[") if host.startswith("[") else host.partition(":")[0]
        if self._hosts is not None and name.lower() not in self._hosts:
            raise ApiError(403, "this server is called by another name; --allowed-host allows it", code="host")

    def _check_key(self, headers: Headers) -> None:
        if not self._keys:
            return
        scheme, _, shown = headers.get("authorization", "").partition(" ")
        given = shown.strip().encode() if scheme.lower() == "bearer" else b""
        # All are compared, so that the time taken tells nothing of which is nearly right.
        if not sum(hmac.compare_digest(given, key) for key in self._keys):
            raise ApiError(
                401,
                "no valid API key; send one as `Authorization: Bearer KEY`",
                kind="authentication_error",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """The whole body. Raises ApiError where it is too long or does not come."""
        most = self._options.max_body_bytes
        too_long = ApiError(413, f"the body is longer than {most} bytes", code="body_too_large")
        # Before a byte is read, where the client tells; it is asked not to send the rest.
        too_long.headers["Connection"] = "close"
        told = headers.get("content-length", "0")
        if told.isdecimal() and int(told[:20]) > most:
            raise too_long
        parts: list[bytes] = []
        num_bytes = 0
        try:
            async with asyncio.timeout(self._options.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ApiError(499, "the client has gone")
                    part = message.get("body", b"")
                    parts.append(part)
                    num_bytes += len(part)
                    if num_bytes > most:
                        raise too_long
                    if not message.get("more_body"):
                        return b"".join(parts)
        except TimeoutError as error:
            raise ApiError(408, "the body did not come in time", headers={"Connection": "close"}) from error


def _again(body: bytes, receive: Receive) -> Receive:
    """Gives a body that was read already, then what comes after it."""
    is_given = False

    async def read() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return read
