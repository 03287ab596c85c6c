"""What this machine has, as `fourfold env` shows it; and the settings that torch's allocator starts with."""

from __future__ import annotations

import os

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fourfold.environment import PACKAGES, Environment

__all__ = ["let_segments_grow", "print_environment"]

# Read by torch when it is first imported: settings of its allocator for GPUs.
ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def let_segments_grow() -> None:
    """Have torch's allocator for GPUs extend its segments in place, unless its settings are given: between large
    tensors of changing sizes, such as those of long rows, a seventh of the memory would lie idle otherwise."""
    if not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        os.environ[ALLOCATOR_SETTINGS[0]] = "expandable_segments:True"


def print_environment(environment: Environment) -> None:
    """Print it as a table, with advice below."""
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("python", environment.python)
    for name, version in environment.versions.items():
        purpose = PACKAGES[name]
        missing = "not installed" if purpose is None else f"not installed ({purpose})"
        table.add_row(name, version or missing)
    table.add_row("system", environment.os)
    table.add_row("processor", Text(f"{environment.cpu}, {environment.cpu_cores} cores"))
    table.add_row("memory", f"{environment.memory_bytes / 2**30:.1f} GiB")
    for index, gpu in enumerate(environment.gpus):
        details = f"{gpu.memory_bytes / 2**30:.1f} GiB"
        if gpu.compute_capability:
            details += f", compute capability {gpu.compute_capability}"
        if gpu.driver:
            details += f", driver {gpu.driver}"
        table.add_row(f"GPU {index}", Text(f"{gpu.name}, {details}"))
    table.add_row("torch built for", f"GPU ({environment.torch_cuda})" if environment.torch_cuda else "CPU")
    table.add_row("bfloat16", "fast" if environment.bfloat16_is_fast else "slow here; float32 is faster")
    Console().print(table)
    for advice in environment.advice:
        typer.secho(f"\n{advice[0].upper()}{advice[1:]}.", fg=typer.colors.YELLOW)
