"""The endpoints."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from fourfold.serving.answering import Answering
from fourfold.serving.errors import ApiError, answer_api_error, answer_http_error, answer_invalid
from fourfold.serving.guard import Guard
from fourfold.serving.metrics import Metrics
from fourfold.serving.options import ServerOptions
from fourfold.serving.page import PAGE_HEADERS, page
from fourfold.serving.requests import ChatRequest, CompletionRequest
from fourfold.serving.responses import ChatCompletion, Completion, ErrorBody, ModelCard, ModelList
from fourfold.serving.runner import Runner
from fourfold.serving.served import Served

__all__ = ["build_app"]

_REFUSED: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorBody, "description": description}
    for status, description in {
        400: "A request that cannot be answered as it is",
        401: "No valid API key",
        403: "Called by a name that is not the server's",
        404: "No such model",
        408: "The body did not come in time",
        413: "The body is too long",
        429: "Too many requests wait",
        500: "The engine failed",
        503: "The server is ending, or the engine has failed for good",
        504: "The answer did not come in time",
    }.items()
}
# Of each event, as OpenAPI has it before version 3.2.
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_EVENTS: dict[str, Any] = {"text/event-stream": {"schema": _EVENT}}


def build_app(served: Served, options: ServerOptions, on_ready: Callable[[], None] | None = None) -> FastAPI:
    """The server's application; its engine runs from startup to shutdown.

    Args:
        served: The model.
        options: Keys and limits.
        on_ready: Called when requests are answered.
    """
    engine = served.engine
    num_slots = engine.max_sequences
    metrics = Metrics(
        {adapter: name for name, adapter in served.models.items()},
        running=lambda: num_slots - engine.free_slots,
        waiting=lambda: engine.waiting,
        num_slots=num_slots,
    )
    runner = Runner(engine, num_slots, options.max_waiting, metrics.observe)
    answering = Answering(served, options, runner)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        runner.start()
        if on_ready is not None:
            on_ready()
        yield
        runner.stop()
        answering.close()

    # No pages of documentation: they would load scripts from elsewhere.
    app = FastAPI(title="Fourfold", version=version("fourfold"), lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, options=options, count=metrics.count)
    app.add_exception_handler(ApiError, answer_api_error)
    app.add_exception_handler(HTTPException, answer_http_error)
    app.add_exception_handler(RequestValidationError, answer_invalid)
    began = int(time.time())
    base = next((name for name, adapter in served.models.items() if adapter is None), None)

    def card(name: str) -> dict[str, Any]:
        adapter = served.models[name]
        root = base if adapter is not None else None
        found = ModelCard(
            id=name, created=began, root=root, is_adapter=adapter is not None, max_model_len=engine.max_length
        )
        return found.model_dump()

    @app.get("/v1/models", response_model=ModelList, responses=_REFUSED)
    async def models() -> Any:
        """The base, and each adapter."""
        return {"object": "list", "data": [card(name) for name in served.models]}

    @app.get("/v1/models/{model:path}", response_model=ModelCard, responses=_REFUSED)
    async def model(model: str) -> Any:
        if model not in served.models:
            raise ApiError(404, f"The model {model[:200]!r} does not exist", param="model", code="model_not_found")
        return card(model)

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={**_REFUSED, 200: {"content": _EVENTS}},
    )
    async def chat(asked: ChatRequest, http: Request) -> Response:
        """The next turn of a conversation."""
        return await answering.chat(asked, http)

    @app.post(
        "/v1/completions",
        response_model=Completion,
        responses={**_REFUSED, 200: {"content": _EVENTS}},
    )
    async def complete(asked: CompletionRequest, http: Request) -> Response:
        """What follows a text."""
        return await answering.complete(asked, http)

    @app.get("/health", responses={503: {"description": "The engine has failed, or the server is ending"}})
    async def health() -> Response:
        """Whether requests are answered."""
        if runner.is_failed:
            return JSONResponse({"status": "failed"}, 503)
        return JSONResponse({"status": "ok", "live": runner.num_live})

    @app.get("/metrics", include_in_schema=False)
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    if options.has_page:

        @app.get("/", include_in_schema=False)
        async def chat_page() -> Response:
            return HTMLResponse(page(), headers=PAGE_HEADERS)

    # FastAPI writes into it what it would answer to a body of another form, where we answer 400.
    for operations in app.openapi()["paths"].values():
        for operation in operations.values():
            operation["responses"].pop("422", None)
    app.state.runner = runner
    return app
