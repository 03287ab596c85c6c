"""Listening: the socket, uvicorn, and an orderly end."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable

import uvicorn

from fourfold.errors import ConfigError
from fourfold.serving.app import build_app
from fourfold.serving.options import ServerOptions
from fourfold.serving.served import Served

__all__ = ["make_server", "open_socket", "serve"]

_BACKLOG = 2048
_SWITCH_SECONDS = 0.0005


def open_socket(options: ServerOptions) -> socket.socket:
    """Listen, before anything is loaded that takes long.

    Raises:
        ConfigError: The address is taken, or not this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            options.host, options.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise ConfigError(f"{options.host} is no address to listen on", found=error.strerror) from error
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"cannot listen on {options.host}, port {options.port}",
            found=error.strerror,
            hint="take another with --port; 0 is any that is free",
        ) from error
    return listener


def serve(
    served: Served,
    options: ServerOptions,
    listener: socket.socket,
    on_ready: Callable[[], None] | None = None,
) -> None:
    """Answer requests until SIGTERM or SIGINT, then let those at work end within `shutdown_timeout`.

    Args:
        served: The model.
        options: How.
        listener: From `open_socket`.
        on_ready: Called when requests are answered.
    """
    # When the engine's thread comes back from the GPU, it is not to wait long for the event loop.
    sys.setswitchinterval(_SWITCH_SECONDS)
    make_server(served, options, on_ready).run(sockets=[listener])


def make_server(served: Served, options: ServerOptions, on_ready: Callable[[], None] | None = None) -> uvicorn.Server:
    """uvicorn over the application, not running yet."""
    config = uvicorn.Config(
        build_app(served, options, on_ready),
        access_log=False,
        log_config=None,
        lifespan="on",
        ws="none",
        server_header=False,
        # Beyond those that are answered, some to be told that too many wait, and the page's.
        limit_concurrency=4 * (served.engine.max_sequences + options.max_waiting) + 64,
        timeout_graceful_shutdown=max(round(options.shutdown_timeout), 1),
    )
    return uvicorn.Server(config)
