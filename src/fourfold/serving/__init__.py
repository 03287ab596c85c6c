"""The server: OpenAI's endpoints over the engine, and a page to chat on."""

from __future__ import annotations

from fourfold.serving.app import build_app
from fourfold.serving.options import ServerOptions
from fourfold.serving.served import Served
from fourfold.serving.server import open_socket, serve

__all__ = ["Served", "ServerOptions", "build_app", "open_socket", "serve"]
