"""What a person or a machine sees: logging, errors with exit codes, results as text or JSON."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import pydantic_core
import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from fourfold.errors import FourfoldError

__all__ = [
    "is_main",
    "print_json",
    "print_result",
    "progress_style",
    "quiet_libraries",
    "reporting_errors",
    "stdout_for_result",
]

EXIT_INTERRUPT = 130  # 128 + SIGINT, as shells have it


def progress_style(as_json: bool) -> str:
    """ "json" for machines, "terminal" where a person watches, "plain" in a log."""
    if as_json:
        return "json"
    return "terminal" if sys.stdout.isatty() else "plain"


def is_main() -> bool:
    """Whether this is the main process of those that torchrun started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def set_up_logging(verbose: bool) -> None:
    """Our own messages from INFO on, those of others only when they are errors. All go to stderr."""
    level = logging.INFO if verbose else logging.ERROR
    logging.basicConfig(
        level=level,
        format="%(asctime)s %(name)s: %(message)s" if verbose else "%(message)s",
        stream=sys.stderr,
        force=True,
    )
    # Of several processes the main one tells.
    quiet = logging.INFO if is_main() else logging.ERROR
    logging.getLogger("fourfold").setLevel(logging.DEBUG if verbose else quiet)
    logging.captureWarnings(True)
    logging.getLogger("py.warnings").setLevel(logging.WARNING if verbose else logging.ERROR)


def quiet_libraries(verbose: bool) -> None:
    """Also quiet the libraries that keep switches of their own. Imports them, which takes seconds."""
    set_up_logging(verbose)
    import datasets
    import transformers

    if verbose:
        transformers.logging.set_verbosity_info()
        return
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.logging.set_verbosity_error()
    datasets.disable_progress_bars()


@contextlib.contextmanager
def reporting_errors(as_json: bool) -> Iterator[None]:
    """Print errors that a person can act on, and leave with the exit code. Others keep their traceback."""
    try:
        yield
    except FourfoldError as error:
        if as_json and is_main():
            print_json({"error": {"type": type(error).__name__, "message": str(error)}})
        if not error.is_told:
            _print_error(error)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt as interrupt:
        typer.echo("Interrupted.", err=True)
        raise typer.Exit(EXIT_INTERRUPT) from interrupt


def _print_error(error: FourfoldError) -> None:
    console = Console(stderr=True)
    if not console.is_terminal:
        # In a log a frame is noise, and lines are not to be wrapped.
        rank = "" if is_main() else f"rank {os.environ['RANK']}: "
        typer.echo(f"{rank}{type(error).__name__}: {error}", err=True)
        return
    # Text, not markup: messages hold brackets of their own.
    console.print(
        Panel(
            Text(str(error)),
            title=Text(type(error).__name__),
            title_align="left",
            border_style="red",
            padding=(1, 2),
        )
    )


def stdout_for_result(as_json: bool) -> contextlib.AbstractContextManager[Any]:
    """With --json, whatever a library prints goes to stderr."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


def print_json(result: object) -> None:
    """One JSON value on one line of stdout. A number that is not finite becomes null, a path text."""
    text = pydantic_core.to_json(result, inf_nan_mode="null", fallback=_plain_data).decode()
    typer.echo(text)


def _plain_data(value: object) -> object:
    to_dict = getattr(value, "to_dict", None)
    return to_dict() if callable(to_dict) else str(value)


def print_result(result: object, as_json: bool, title: str = "") -> None:
    """A verb's result: JSON, or its own `lines()`, or its fields as a table."""
    if as_json:
        print_json(result)
        return
    lines = getattr(result, "lines", None)
    if callable(lines):
        for line in lines():
            typer.echo(line)
        return
    fields: Any = pydantic_core.to_jsonable_python(result, inf_nan_mode="strings", fallback=_plain_data)
    if not isinstance(fields, Mapping):
        typer.echo(str(fields))
        return
    table = Table(title=title or None, title_justify="left", show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _flat(fields):
        table.add_row(name, Text(_shown(name, value)))
    Console().print(table)


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _shown(name: str, value: object) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "–"}[value]
    if isinstance(value, int) and name.endswith("_bytes"):
        return f"{value / 2**20:,.1f} MiB"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list):
        return ", ".join(_shown("", item) for item in value)
    return str(value)
