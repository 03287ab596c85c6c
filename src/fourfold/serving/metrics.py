"""What Prometheus reads of a server."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fourfold.inference.requests import Chunk
from fourfold.serving.runner import Answer

__all__ = ["ENDPOINTS", "Metrics"]

ENDPOINTS = ("/", "/health", "/metrics", "/v1/models", "/v1/chat/completions", "/v1/completions")

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Counts what one server does, in a registry of its own.

    Args:
        names: The name that requests have for each adapter; None is the base.
        running, waiting: Sequences that have a slot, and that wait for one.
        num_slots: Slots that there are.
    """

    def __init__(
        self, names: dict[str | None, str], running: Callable[[], int], waiting: Callable[[], int], num_slots: int
    ) -> None:
        self._names = names
        self.registry = registry = CollectorRegistry()
        self._requests = Counter(
            "fourfold_requests", "Requests answered, by endpoint and status.", ["endpoint", "status"], registry=registry
        )
        self._prompt = Counter("fourfold_prompt_tokens", "Tokens of prompts.", ["model"], registry=registry)
        self._generated = Counter("fourfold_generated_tokens", "Tokens generated.", ["model"], registry=registry)
        self._finished = Counter(
            "fourfold_answers", "Answers that ended, by why.", ["model", "finish_reason"], registry=registry
        )
        self._first = Histogram(
            "fourfold_time_to_first_token_seconds",
            "From a request's arrival in the queue to its first token.",
            ["model"],
            buckets=_SECONDS,
            registry=registry,
        )
        self._whole = Histogram(
            "fourfold_answer_seconds", "From arrival to the last token.", ["model"], buckets=_SECONDS, registry=registry
        )
        self._each = Histogram(
            "fourfold_time_per_token_seconds",
            "Mean of an answer, its first token left out.",
            ["model"],
            buckets=_TOKEN_SECONDS,
            registry=registry,
        )
        for name, help_text, read in (
            ("fourfold_running", "Sequences that have a slot.", running),
            ("fourfold_waiting", "Sequences that wait for a slot.", waiting),
            ("fourfold_slots", "Slots that there are.", lambda: num_slots),
        ):
            Gauge(name, help_text, registry=registry).set_function(read)

    def observe(self, answer: Answer, chunk: Chunk) -> None:
        """Called by the runner with each chunk of an answer."""
        sequence, name = chunk.sequence, self._names[answer.request.adapter]
        if chunk.token_ids:
            self._generated.labels(name).inc(len(chunk.token_ids))
        if chunk.finish_reason is None:
            return
        now = time.monotonic()
        num_tokens = len(sequence.token_ids)
        self._finished.labels(name, chunk.finish_reason).inc()
        self._prompt.labels(name).inc(len(answer.request.prompt_ids))
        self._whole.labels(name).observe(now - answer.answers.submitted)
        if sequence.first_token_at is not None:
            self._first.labels(name).observe(sequence.first_token_at - answer.answers.submitted)
            if num_tokens > 1:
                self._each.labels(name).observe((now - sequence.first_token_at) / (num_tokens - 1))

    def count(self, endpoint: str, status: int) -> None:
        """A request that was answered. Paths that there are not count as one: anybody can think of more."""
        endpoint = endpoint if endpoint in ENDPOINTS else "other"
        self._requests.labels(endpoint, str(status)).inc()

    def text(self) -> bytes:
        """The exposition format."""
        return generate_latest(self.registry)
