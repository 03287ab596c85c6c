"""How a server listens, whom it answers, and what a request may take."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from fourfold.errors import ConfigError

__all__ = ["ServerOptions"]

_LOOPBACK_NAMES = ("localhost",)


@dataclass(frozen=True)
class ServerOptions:
    """Options of the server.

    Attributes:
        host: Address to listen on; by default this machine alone reaches it.
        port: Port to listen on; 0 takes a free one.
        api_keys: Keys one of which a request must show; empty: none is asked for.
        allowed_hosts: Names by which a server without keys on a loopback address may be called, beside those of the
            loopback itself. A web page of another site that points its own name here is refused.
        max_body_bytes: Longest body of a request.
        max_tokens: Most tokens that a request may ask for; None: what the model's context holds.
        max_choices: Most answers of one request: prompts times `n`.
        max_waiting: Sequences that may wait for a slot; more are answered 429.
        request_timeout: Seconds a request may take, waiting and being read by its client included.
        body_timeout: Seconds in which the body of a request must have come.
        shutdown_timeout: Seconds that requests at work may still take when the server is told to end.
        max_schema_bytes: Longest JSON schema.
        has_page: Whether there is the page at `/`.

    Raises:
        ConfigError: A value that is not allowed.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_keys: tuple[str, ...] = field(default=(), repr=False)
    allowed_hosts: tuple[str, ...] = ()
    max_body_bytes: int = 2**20
    max_tokens: int | None = None
    max_choices: int = 16
    max_waiting: int = 64
    request_timeout: float = 600.0
    body_timeout: float = 30.0
    shutdown_timeout: float = 30.0
    max_schema_bytes: int = 2**16
    has_page: bool = True

    def __post_init__(self) -> None:
        for name, least in (("max_body_bytes", 1), ("max_choices", 1), ("max_waiting", 0), ("max_schema_bytes", 2)):
            if getattr(self, name) < least:
                raise ConfigError(name, found=getattr(self, name), allowed=f"at least {least}")
        if self.max_tokens is not None and self.max_tokens < 1:
            raise ConfigError("max_tokens", found=self.max_tokens, allowed="at least 1")
        if not 0 <= self.port <= 65535:
            raise ConfigError("port", found=self.port, allowed="0 (a free one) to 65535")
        for name in ("request_timeout", "body_timeout", "shutdown_timeout"):
            if not getattr(self, name) > 0:
                raise ConfigError(name, found=getattr(self, name), allowed="seconds, above 0")
        if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in self.api_keys):
            raise ConfigError("an API key is empty or has characters that a header cannot carry", allowed="ASCII")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        if self.host in _LOOPBACK_NAMES:
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
