"""The `fourfold` command. The only place that sets up logging, prints, and turns errors into exit codes."""

from __future__ import annotations

from fourfold.cli.verbs import app, main

__all__ = ["app", "main"]
