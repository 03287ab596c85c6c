"""From a request's body to its answer."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from typing import TypeVar

from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from fourfold.inference.requests import Request
from fourfold.inference.sampling import SamplingOptions
from fourfold.serving.bodies import Body, ChatBody, CompletionBody
from fourfold.serving.constraints import Grammars
from fourfold.serving.errors import ApiError
from fourfold.serving.options import ServerOptions
from fourfold.serving.requests import ChatRequest, CompletionRequest, Sampling
from fourfold.serving.responses import usage_of
from fourfold.serving.runner import Answers, Runner
from fourfold.serving.served import Prompter, Served
from fourfold.serving.streaming import ClientGoneError, EventStream, collect, unless_gone

__all__ = ["Answering"]

T = TypeVar("T")


class Answering:
    """Answers chats and completions.

    Args:
        served: The model.
        options: The limits.
        runner: Where answers are generated.
    """

    def __init__(self, served: Served, options: ServerOptions, runner: Runner) -> None:
        self._models = served.models
        engine = served.engine
        self._max_length = engine.max_length
        self._vocab_size = engine.step_of_model.vocab_size
        self._options = options
        self._max_tokens = min(options.max_tokens or self._max_length, self._max_length)
        self._runner = runner
        # A copy: the engine's own is used by its thread meanwhile.
        self._prompter = Prompter(deepcopy(engine.tokenizer), self._max_length, self._vocab_size)
        self._grammars = Grammars(engine.tokenizer, self._vocab_size, sorted(engine.stop_ids), options.max_schema_bytes)
        # One thread, for a tokenizer serves one at a time; two, for a schema may take long.
        self._prompting = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prompts")
        self._compiling = ThreadPoolExecutor(max_workers=2, thread_name_prefix="schemas")

    def close(self) -> None:
        self._prompting.shutdown(wait=False, cancel_futures=True)
        self._compiling.shutdown(wait=False, cancel_futures=True)

    async def chat(self, asked: ChatRequest, http: HttpRequest) -> Response:
        """Raises ApiError for what is not answered."""
        # Before any work, which those that are refused would take from the others.
        self._runner.require_room(1)
        deadline = self._deadline()
        adapter = self._adapter(asked.model)
        max_tokens = self._tokens_of(asked.max_completion_tokens or asked.max_tokens)
        prompts = await self._beside(self._prompting, lambda: [self._prompter.chat(asked.messages)])
        answers = await self._submit(asked, adapter, prompts, max_tokens, asked.num_logprobs)
        body = ChatBody("chatcmpl", asked.model, self._grammars, asked.num_logprobs is not None, asked.wants_usage)
        return await self._respond(asked, answers, body, http, deadline)

    async def complete(self, asked: CompletionRequest, http: HttpRequest) -> Response:
        """Raises ApiError for what is not answered."""
        # Before any work, which those that are refused would take from the others.
        self._runner.require_room(1)
        deadline = self._deadline()
        adapter = self._adapter(asked.model)
        # OpenAI's default of this endpoint.
        max_tokens = self._tokens_of(asked.max_tokens or min(16, self._max_tokens))
        texts = asked.prompts()
        self._check_choices(len(texts), asked.n or 1)
        prompts = await self._beside(self._prompting, lambda: [self._prompter.text(text) for text in texts])
        answers = await self._submit(asked, adapter, prompts, max_tokens, asked.logprobs)
        body = CompletionBody("cmpl", asked.model, self._grammars, asked.logprobs is not None, asked.wants_usage)
        return await self._respond(asked, answers, body, http, deadline)

    def _deadline(self) -> float:
        return asyncio.get_running_loop().time() + self._options.request_timeout

    def _adapter(self, model: str) -> str | None:
        if model not in self._models:
            raise ApiError(
                404,
                f"The model {model[:200]!r} does not exist; there are {', '.join(self._models)}",
                param="model",
                code="model_not_found",
            )
        return self._models[model]

    def _tokens_of(self, asked: int | None) -> int:
        if asked is not None and asked > self._max_tokens:
            raise ApiError(
                400,
                f"max_tokens is too large: {asked}. Allowed are 1 to {self._max_tokens}",
                param="max_tokens",
                code="max_tokens_too_large",
            )
        return asked or self._max_tokens

    def _check_choices(self, num_prompts: int, n: int) -> None:
        if num_prompts * n > self._options.max_choices:
            raise ApiError(
                400,
                f"{num_prompts} prompts with n={n} are more than {self._options.max_choices} answers of one request",
                param="n",
            )

    async def _beside(self, threads: ThreadPoolExecutor, make: Callable[[], T]) -> T:
        """What takes a while, so that the event loop goes on."""
        return await asyncio.get_running_loop().run_in_executor(threads, make)

    async def _submit(
        self, asked: Sampling, adapter: str | None, prompts: list[list[int]], max_tokens: int, logprobs: int | None
    ) -> Answers:
        n = asked.n or 1
        self._check_choices(len(prompts), n)
        seed = secrets.randbits(62) if asked.seed is None else asked.seed
        constraints = await self._beside(
            self._compiling,
            lambda: [self._grammars.constraint(asked.response_format) for _ in range(len(prompts) * n)],
        )
        requests = [
            Request(
                prompt_ids=tuple(prompt),
                sampling=self._sampling(asked, seed, choice),
                # The rest of the context, where that is less.
                max_new_tokens=min(max_tokens, self._max_length - len(prompt)),
                stop=asked.stop_strings(),
                logprobs=logprobs,
                adapter=adapter,
                constraint=constraints[index * n + choice],
                # Where the JSON is whole, nothing but its end may follow.
                ignore_eos=bool(asked.ignore_eos) and constraints[index * n + choice] is None,
            )
            for index, prompt in enumerate(prompts)
            for choice in range(n)
        ]
        return self._runner.submit(requests)

    def _sampling(self, asked: Sampling, seed: int, choice: int) -> SamplingOptions:
        """OpenAI's defaults. Choices of one prompt have seeds in a row, which begin anew at the end of 63 bits."""
        return SamplingOptions(
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_k=min(max(asked.top_k or 0, 0), self._vocab_size),
            top_p=1.0 if asked.top_p is None else asked.top_p,
            min_p=asked.min_p or 0.0,
            repetition_penalty=asked.repetition_penalty or 1.0,
            frequency_penalty=asked.frequency_penalty or 0.0,
            presence_penalty=asked.presence_penalty or 0.0,
            logit_bias=self._bias(asked),
            seed=(seed + choice) % 2**63,
        )

    def _bias(self, asked: Sampling) -> tuple[tuple[int, float], ...]:
        biases = tuple((int(token), bias) for token, bias in (asked.logit_bias or {}).items())
        if unknown := [token for token, _ in biases if token >= self._vocab_size]:
            raise ApiError(
                400,
                f"logit_bias: the model has no token {unknown[0]}; allowed are 0 to {self._vocab_size - 1}",
                param="logit_bias",
            )
        return biases

    async def _respond(
        self, asked: Sampling, answers: Answers, body: Body, http: HttpRequest, deadline: float
    ) -> Response:
        if asked.stream:
            return EventStream(answers, body, deadline, asked.wants_usage)
        try:
            pieces = await unless_gone(http.receive, collect(answers, deadline))
        except ClientGoneError:
            return Response(status_code=499)  # nobody reads it
        finally:
            answers.close()
        usage = usage_of(
            sum(len(part.request.prompt_ids) for part in answers.parts),
            sum(piece.num_tokens for piece in pieces),
        )
        return JSONResponse(body.whole(pieces, usage))
