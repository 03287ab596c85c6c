"""What `fourfold plan` prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table

from fourfold.cli.terminal import print_json

if TYPE_CHECKING:
    from fourfold.config import RunConfig
    from fourfold.memory.gpus import Gpu
    from fourfold.memory.plan import Plan
    from fourfold.planning import Strategy

__all__ = ["print_comparison", "print_plan"]

GIB = 2**30


def print_plan(config: RunConfig, gpu: Gpu, num_gpus: int, host_bytes: int | None, as_json: bool) -> bool:
    """The plan, or what would fit; returns whether something does."""
    from fourfold.planning import plan, remedies

    made = plan(config, gpu, host_bytes, num_gpus)
    helps = [] if made.chosen else list(remedies(config, gpu, host_bytes, num_gpus))
    if as_json:
        entries = [
            {"what": one.what, "change": one.change, "num_gpus": one.num_gpus, "plan": one.plan.to_dict()}
            for one in helps
        ]
        print_json({**made.to_dict(), "remedies": entries})
        return made.chosen is not None
    for line in made.lines():
        typer.echo(line)
    if made.by_strategy:
        _print_strategies(made)
    for one in helps:
        chosen = one.plan.chosen
        assert chosen is not None
        peak = chosen.footprint.peak_bytes / GIB
        typer.echo(f"  would fit: {one}: {chosen.tokens_per_second:,.0f} tokens/s, {peak:.2f} GiB")
    if made.chosen is None and not helps:
        typer.echo("  nothing known here makes it fit: take a smaller model, or a larger GPU")
    return made.chosen is not None


def _print_strategies(made: Plan) -> None:
    """The ways to share a run as a table, by memory of a GPU, traffic and speed."""
    from fourfold.memory.plan import FORECAST

    table = Table(box=None, pad_edge=False)
    for name in ("strategy", "GiB", "weights", "optimizer", "activations", "buffers", "GB passed", "s", "tokens/s", ""):
        table.add_column(name, justify="left" if name in ("strategy", "") else "right")
    for name, plan in made.by_strategy.items():
        candidate = plan.chosen or plan.smallest
        assert candidate is not None
        fits = plan.chosen is not None
        parallelism = candidate.parallelism
        words = [] if fits else [plan.lacking(candidate)]
        words += [f"{parallelism.offload} in host memory"] if parallelism.offloads_optimizer else []
        words += [] if plan.not_run is None else [FORECAST]
        table.add_row(
            f"> {name}" if candidate is made.chosen else name,
            f"{candidate.footprint.peak_bytes / GIB:.2f}",
            *(f"{size / GIB:.2f}" for size in candidate.footprint.kinds.values()),
            f"{candidate.traffic_bytes / 1e9:.1f}",
            f"{candidate.seconds:.2f}",
            f"{candidate.tokens_per_second:,.0f}",
            "; ".join(words),
            style=None if fits else "dim",
        )
    console = _console()
    console.print(table)
    for name, reason in made.refused.items():
        console.print(f"{name}: {' '.join(reason.split())}", style="dim", highlight=False)
    for reason in dict.fromkeys(plan.not_run for plan in made.by_strategy.values() if plan.not_run):
        names = [name for name, plan in made.by_strategy.items() if plan.not_run == reason]
        console.print(f"{FORECAST}: {', '.join(names)}: {reason}", style="dim", highlight=False)


def print_comparison(strategies: list[Strategy], picture: Path | None, as_json: bool) -> None:
    """The strategies as a table, and as a picture where one is asked for."""
    shown = [(one.name, one.plan, one.plan.chosen or one.plan.smallest) for one in strategies]
    if picture is not None:
        from fourfold.memory.picture import draw_footprints

        gpu = shown[0][1].gpu
        held = {name: candidate.footprint for name, _, candidate in shown if candidate is not None}
        draw_footprints(picture, held, gpu.usable_bytes, title=gpu.name)
    if as_json:
        rows: list[dict[str, Any]] = [{"strategy": one.name, **one.plan.to_dict()} for one in strategies]
        print_json({"strategies": rows, "picture": picture})
        return
    first = shown[0][2]
    assert first is not None
    num_gpus = first.parallelism.num_gpus
    title = f"for {num_gpus} x {shown[0][1].gpu.name}" if num_gpus > 1 else f"for {shown[0][1].gpu.name}"
    table = Table(box=None, pad_edge=False, title=title, title_justify="left")
    traffic = ["GiB between"] if num_gpus > 1 else []
    for name in ("strategy", "rows", "tokens/s", "peak GiB", "host GiB", *traffic, ""):
        table.add_column(name, justify="left" if name in ("strategy", "") else "right", no_wrap=True)
    for name, made, candidate in shown:
        assert candidate is not None
        fits = made.chosen is not None
        table.add_row(
            name,
            f"{candidate.batch} x {candidate.accumulation}",
            f"{candidate.tokens_per_second:,.0f}" if fits else "",
            f"{candidate.footprint.peak_bytes / GIB:.2f}",
            f"{candidate.host_bytes / GIB:.1f}" if candidate.host_bytes else "",
            *([f"{candidate.traffic_bytes / GIB:.2f}"] if num_gpus > 1 else []),
            "" if fits else made.why_not(candidate),
            style=None if fits else "dim",
        )
    _console().print(table)
    if picture is not None:
        typer.echo(f"picture: {picture}")


def _console() -> Console:
    """As wide as the terminal; of a file or a pipe, as wide as the table."""
    console = Console()
    return console if console.is_terminal else Console(width=140)
