"""What a request is refused by, in the form of OpenAI's errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

__all__ = ["ApiError", "answer_api_error", "answer_http_error", "answer_invalid", "as_text", "error_body"]

_MOST_FAULTS, _MOST_CHARACTERS = 8, 300


class ApiError(Exception):
    """A request that is not answered.

    Args:
        status: The HTTP status.
        message: What is wrong, and what is allowed.
        kind: OpenAI's `type`.
        param: The field of the request that it is about.
        code: OpenAI's `code`, which programs read.
        headers: More headers of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        return error_body(self.message, self.kind, self.param, self.code)

    def response(self) -> JSONResponse:
        return JSONResponse(self.body(), self.status, headers=self.headers)


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    return {"error": {"message": as_text(message), "type": kind, "param": param and as_text(param), "code": code}}


def as_text(value: str) -> str:
    """A text that UTF-8 can hold: what a client sent may have half of a surrogate pair in it."""
    return value.encode("utf-8", "replace").decode("utf-8")


async def answer_api_error(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, ApiError)
    return error.response()


async def answer_http_error(_: Request, error: Exception) -> JSONResponse:
    """No such path or method, or a body that is no JSON."""
    assert isinstance(error, HTTPException)
    body = error_body(str(error.detail), "invalid_request_error")
    return JSONResponse(body, error.status_code, headers=error.headers)


async def answer_invalid(_: Request, error: Exception) -> JSONResponse:
    """A body that is not of the endpoint's form: 400, as OpenAI has it, with each fault and its place."""
    assert isinstance(error, RequestValidationError)
    faults = error.errors()
    said = []
    for fault in faults[:_MOST_FAULTS]:
        place = ".".join(str(part) for part in fault["loc"] if part != "body")
        said.append(f"{place}: {fault['msg']}"[:_MOST_CHARACTERS] if place else str(fault["msg"])[:_MOST_CHARACTERS])
    if len(faults) > _MOST_FAULTS:
        said.append(f"and {len(faults) - _MOST_FAULTS} more")
    place = ".".join(str(part) for part in faults[0]["loc"] if part != "body")[:_MOST_CHARACTERS] if faults else ""
    return ApiError(400, "; ".join(said), param=place or None).response()
