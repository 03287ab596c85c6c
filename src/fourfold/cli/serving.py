"""The verb `serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fourfold.cli.options import Json, Verbose
from fourfold.cli.terminal import print_json, quiet_libraries, reporting_errors, stdout_for_result
from fourfold.errors import ConfigError

if TYPE_CHECKING:
    from fourfold.serving import Served

__all__ = ["serve"]

KEY_VARIABLE = "FOURFOLD_API_KEY"


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL_OR_RUN", help="Folder of a run or a model, or a hub's name.")],
    adapter: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="Another adapter of the same base, asked for by NAME; repeatable."),
    ] = None,
    name: Annotated[str | None, typer.Option(help="What requests call it; without it, the folder's own name.")] = None,
    load_in_4bit: Annotated[
        bool, typer.Option("--load-in-4bit", help="Quantize a model to NF4; a run is loaded as it was trained.")
    ] = False,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 for all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: one that is free.")] = 8000,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help=f"File of API keys, one a line; without it, those in {KEY_VARIABLE}, with commas between."),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Another name by which a server without keys on this machine may be called; repeatable."),
    ] = None,
    max_sequences: Annotated[
        int | None, typer.Option(min=1, help="Answers that are generated at a time; without it, what fits, up to 64.")
    ] = None,
    max_length: Annotated[int, typer.Option(min=2, help="Tokens of a prompt and its answer together.")] = 4096,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens of an answer.")] = None,
    max_choices: Annotated[int, typer.Option(min=1, help="Most answers of one request: prompts times n.")] = 16,
    max_waiting: Annotated[int, typer.Option(min=0, help="Answers that may wait; more are answered 429.")] = 64,
    max_body_bytes: Annotated[int, typer.Option(min=1, help="Longest body of a request.")] = 2**20,
    request_timeout: Annotated[float, typer.Option(min=0.001, help="Seconds a request may take.")] = 600.0,
    shutdown_timeout: Annotated[float, typer.Option(min=1, help="Seconds for what is at work at the end.")] = 30.0,
    page: Annotated[bool, typer.Option(help="Whether there is a page to chat on at /.")] = True,
    print_vllm: Annotated[
        Path | None,
        typer.Option(metavar="OUT", help="Export the adapters to OUT, print the vllm command that serves them, leave."),
    ] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Serve a model or a run: OpenAI's endpoints, and a page to chat on."""
    with reporting_errors(json):
        keys = _read_keys(api_key_file)
        adapters = dict(_named(each) for each in adapter or [])
        quiet_libraries(verbose)
        from fourfold import hosting
        from fourfold.hosted import find_hosted
        from fourfold.inference import EngineOptions
        from fourfold.serving import ServerOptions

        options = ServerOptions(
            host=host,
            port=port,
            api_keys=keys,
            allowed_hosts=tuple(allowed_host or ()),
            max_body_bytes=max_body_bytes,
            max_tokens=max_tokens,
            max_choices=max_choices,
            max_waiting=max_waiting,
            request_timeout=request_timeout,
            shutdown_timeout=shutdown_timeout,
            has_page=page,
        )
        # Several keys are several users; what is in a cache already is answered sooner, which would tell of others'.
        engine_options = EngineOptions(
            max_sequences=max_sequences, max_length=max_length, reuse_prefixes=len(keys) <= 1
        )
        hosted = find_hosted(model, adapters, name=name, load_in_4bit=load_in_4bit)
        if print_vllm is not None:
            with stdout_for_result(json):
                command = hosting.vllm_hand_over(hosted, print_vllm, engine_options, options)
            if json:
                print_json({"vllm": command})
            else:
                typer.echo(command)
            return
        if not options.is_loopback and not keys:
            typer.secho(
                f"Whoever reaches {host} can use this server: it asks for no key. Set {KEY_VARIABLE}.",
                fg=typer.colors.YELLOW,
                err=True,
            )

        def listening(served: Served, real_port: int) -> None:
            url = f"http://{f'[{host}]' if ':' in host else host}:{real_port}"
            if json:
                print_json({"event": "listening", "url": url, "models": list(served.models)})
                return
            typer.echo(f"{', '.join(served.models)}: {url}/v1")
            if page:
                typer.echo(f"chat on {url}/")

        hosting.host(hosted, engine_options, options, listening)


def _named(given: str) -> tuple[str, str]:
    name, equals, folder = given.partition("=")
    if not (name and equals and folder):
        raise ConfigError("--adapter", found=given, allowed="NAME=FOLDER")
    return name, folder


def _read_keys(file: Path | None) -> tuple[str, ...]:
    if file is None:
        return tuple(filter(None, (key.strip() for key in os.environ.get(KEY_VARIABLE, "").split(","))))
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file of API keys cannot be read: {file}", found=type(error).__name__) from error
    keys = tuple(filter(None, (line.strip() for line in lines)))
    if not keys:
        raise ConfigError(f"no API key in {file}", allowed="one a line")
    return keys
