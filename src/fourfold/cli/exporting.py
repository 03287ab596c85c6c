"""The verb `export`."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fourfold.cli.options import BoundKl, BoundTop1, Json, Verbose
from fourfold.cli.terminal import print_result, quiet_libraries, reporting_errors, stdout_for_result

__all__ = ["Target", "export"]


class Target(StrEnum):
    """The keys of `fourfold.export.targets.EXPORTS`, named here so that `--help` need not import it."""

    safetensors = "safetensors"
    bnb_4bit = "bnb-4bit"
    gguf = "gguf"
    adapter = "adapter"


def export(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run or of its adapter.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder for what is exported.")],
    target: Annotated[
        Target,
        typer.Option(
            "--format",
            help="safetensors: merged, 16 bits. bnb-4bit: merged, 4 bits. gguf: merged, for llama.cpp and Ollama. "
            "adapter: for vLLM and SGLang.",
        ),
    ],
    quantization: Annotated[
        str | None,
        typer.Option(
            help="gguf: F16 (default), BF16, F32, Q8_0, Q5_1, Q5_0, Q4_1, Q4_0. bnb-4bit: nf4 (default), fp4."
        ),
    ] = None,
    bound_kl: BoundKl = None,
    bound_top1: BoundTop1 = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write a run's model for what will serve it, load it again as that does, and prove that it answers alike."""
    with reporting_errors(json):
        quiet_libraries(verbose)
        from fourfold import exporting

        with stdout_for_result(json):
            report = exporting.export(
                run, Path(out), target.value, quantization, bound_kl=bound_kl, bound_top1=bound_top1
            )
        print_result(report, json)
