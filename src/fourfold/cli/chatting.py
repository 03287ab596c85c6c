"""The verb `chat`."""

from __future__ import annotations

import contextlib
import sys
from typing import Annotated, Any

import typer

from fourfold.cli.options import Json, Verbose
from fourfold.cli.terminal import print_json, quiet_libraries, reporting_errors, stdout_for_result
from fourfold.errors import InferenceError

__all__ = ["chat"]


def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="Folder of a run or a model, or a hub's name.")],
    prompt: Annotated[
        str | None, typer.Option(help="Answer this and leave; - reads it from the standard input.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="Text of the system turn.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0: always the likeliest token.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0, max=1, help="Sample from this share of probability.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of sampling.")] = 0,
    top_k: Annotated[
        int | None,
        typer.Option(min=0, help="Sample from the k likeliest tokens, 0 for all; without it as the model says."),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Sample from tokens at least this share as likely as the likeliest."),
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option(min=0, help="Above 1, tokens that were there become less likely; without it as the model says."),
    ] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="A text that ends the answer; may be given several times.")
    ] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Talk to a model or to the result of a run."""
    if json and prompt is None:
        raise typer.BadParameter("needs --prompt", param_hint="--json")
    with reporting_errors(json):
        quiet_libraries(verbose)
        from fourfold import pipeline

        asked: dict[str, Any] = {
            "top_k": top_k,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "stop": tuple(stop) if stop else None,
        }
        with stdout_for_result(json):
            session = pipeline.chat(
                model,
                max_new_tokens=max_new_tokens,
                temperature=temperature,
                top_p=top_p,
                seed=seed,
                **{name: value for name, value in asked.items() if value is not None},
            )
        history = [{"role": "system", "content": system}] if system else []
        if prompt is None:
            for line in session.lines():
                _tell(line)
            _converse(session, history)
            return
        text = sys.stdin.read().strip() if prompt == "-" else prompt
        history.append({"role": "user", "content": text})
        if json:
            with contextlib.redirect_stdout(sys.stderr):
                reply = "".join(session.reply(history))
            figures = {} if session.figures is None else session.figures.to_dict()
            print_json({"prompt": text, "reply": reply, **figures})
            return
        _stream(session, history)


def _stream(session: Any, history: list[dict[str, str]]) -> str:
    """Print the answer as it comes. Ctrl-C stops the answer, not the conversation."""
    pieces: list[str] = []
    for piece in session.reply(history):
        pieces.append(piece)
        typer.echo(piece, nl=False)
    typer.echo()
    if session.figures is not None:
        _tell(session.figures.line())
    return "".join(pieces)


def _tell(line: str) -> None:
    """What is beside the answer, to a person who watches; the answer alone may be going into a file."""
    if sys.stderr.isatty():
        typer.secho(line, dim=True, err=True)


def _converse(session: Any, opening: list[dict[str, str]]) -> None:
    typer.secho("/reset starts anew, /exit or Ctrl-D leaves, Ctrl-C stops an answer.", dim=True)
    history = list(opening)
    while True:
        try:
            text = input("\n> ").strip()
        except (EOFError, KeyboardInterrupt):
            typer.echo()
            return
        if text == "/exit":
            return
        if text == "/reset":
            history = list(opening)
        elif text:
            asked = [*history, {"role": "user", "content": text}]
            try:
                history = [*asked, {"role": "assistant", "content": _stream(session, asked)}]
            except KeyboardInterrupt:
                # The broken-off turn is forgotten: a template wants whole answers.
                typer.echo("\n(stopped)")
            except InferenceError as error:
                # As is one that is too long: a new conversation need not be.
                typer.secho(str(error), err=True)
