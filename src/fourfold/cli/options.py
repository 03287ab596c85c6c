"""Options that several verbs have."""

from __future__ import annotations

from typing import Annotated

import typer

__all__ = ["BoundKl", "BoundTop1", "Json", "Verbose"]

Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout, and nothing else there.")]
Verbose = Annotated[bool, typer.Option("--verbose", help="Show the libraries' own messages too.")]
BoundKl = Annotated[float | None, typer.Option("--bound-kl", min=0, help="Fail above this mean KL, in nats a token.")]
BoundTop1 = Annotated[
    float | None,
    typer.Option("--bound-top1", min=0, max=1, help="Fail below this share of same likeliest tokens."),
]
