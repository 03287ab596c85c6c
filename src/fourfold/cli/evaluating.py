"""The verb `evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from fourfold.cli.options import Json, Verbose
from fourfold.cli.terminal import (
    print_json,
    print_result,
    progress_style,
    quiet_libraries,
    reporting_errors,
    stdout_for_result,
)
from fourfold.config import RunConfig, load_config

if TYPE_CHECKING:
    from fourfold.evaluation.side_by_side import Cell, Comparison

__all__ = ["EvaluateCommand", "evaluate", "print_comparison"]

MIB = 2**20


class EvaluateCommand(TyperCommand):
    """A command whose option --compare takes all words behind it, up to the next option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        words: list[str] = []
        rest = list(args)
        while rest:
            word = rest.pop(0)
            if word != "--compare":
                words.append(word)
                continue
            named: list[str] = []
            while rest and not rest[0].startswith("--"):
                named += ["--compare", rest.pop(0)]
            # Without a model it is an option without its value, which is refused.
            words += named or ["--compare"]
        parsed: list[str] = super().parse_args(ctx, words)
        return parsed


def evaluate(
    context: typer.Context,
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="YAML file of the run, or the folder of a run; or give --compare."),
    ] = None,
    compare: Annotated[
        list[str] | None,
        typer.Option(
            metavar="MODEL ...",
            help="Models side by side: base16, base4, adapter, merged of the run; folders of runs, adapters or models; "
            "RUN@merged, MODEL@nf4.",
        ),
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="With --compare: draw it (.png, .svg, .pdf).")] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure a run by loss, answers, perplexity, multiple choice and lm-evaluation-harness; or models side by side."""
    if config is None and not compare:
        raise typer.BadParameter("give a CONFIG, or models to --compare", param_hint="CONFIG")
    if picture is not None and not compare:
        raise typer.BadParameter("needs --compare", param_hint="--picture")
    words = list(context.args)
    if config is not None and config.startswith("--"):
        # Without CONFIG, the first key of the configuration stands in its place.
        words.insert(0, config)
        config = None
    with reporting_errors(json):
        run_config = load_config(config, words) if config or not compare else None
        quiet_libraries(verbose)
        progress = "plain" if json else progress_style(json)
        stdout = stdout_for_result(json)
        if not compare:
            from fourfold import pipeline

            assert run_config is not None
            with stdout:
                results = pipeline.evaluate(run_config, progress=progress)
            print_result(results, json)
            return
        from fourfold import evaluating
        from fourfold.evaluation.picture import check_picture, draw_comparison

        if picture is not None:
            check_picture(picture)
        if run_config is None:
            run_config = _config_of(compare, words)
        with stdout:
            comparison = evaluating.compare(run_config, compare, progress=progress)
        if picture is not None:
            draw_comparison(picture, comparison, title=_title(comparison))
        print_comparison(comparison, picture, json)


def _config_of(names: list[str], words: list[str]) -> RunConfig:
    """Without CONFIG: that of the first run among the names, or all keys from the command line."""
    from fourfold.variants import run_among

    run = run_among(names)
    if run is not None:
        return load_config(run, words)
    first = names[0].rpartition("@")[0] or names[0]
    given = any(word.partition("=")[0] in ("--model_name_or_path", "--model-name-or-path") for word in words)
    return load_config(None, words if given else [f"--model_name_or_path={first}", *words])


def _title(comparison: Comparison) -> str:
    level = comparison.options.level
    return f"{level:.0%} intervals; {_counts(comparison)}"


def _counts(comparison: Comparison) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in comparison.counts.items())


def print_comparison(comparison: Comparison, picture: Path | None, as_json: bool) -> None:
    """The models as columns, a figure to a row: its value, its interval, and what it is above the first model's."""
    if as_json:
        print_json({**comparison.to_dict(), "picture": picture})
        return
    names = [model.name for model in comparison.models]
    table = Table(box=None, pad_edge=False)
    table.add_column("")
    for name in names:
        table.add_column(Text(name), justify="right", no_wrap=True)
    for figure, cells in comparison.cells.items():
        arrow = "↑" if comparison.higher_is_better[figure] else "↓"
        table.add_row(Text(f"{figure} {arrow}", style="bold"), *(_value(cells.get(name)) for name in names))
        table.add_row("", *(_interval(cells.get(name)) for name in names), style="dim")
        if any(cell.difference for cell in cells.values()):
            against = Text(f"  against {names[0]}")
            # Losses and perplexities have no scale of their own.
            in_percent = not comparison.higher_is_better[figure]
            table.add_row(against, *(_difference(cells.get(name), in_percent) for name in names))
    table.add_row("")
    for label, values in _costs(comparison).items():
        if any(values):
            table.add_row(label, *(value or "–" for value in values))
    console = Console()
    if not console.is_terminal:
        # Of a file or a pipe: as wide as the table.
        console = Console(width=40 + 26 * len(names))
    console.print(table)
    for line in _notes(comparison):
        console.print(line, highlight=False, style="dim")
    if picture is not None:
        typer.echo(f"picture: {picture}")


def _value(cell: Cell | None) -> Text:
    return Text("does not compare", style="dim") if cell is None else Text(f"{cell.value:.4g}", style="bold")


def _interval(cell: Cell | None) -> str:
    if cell is None or cell.interval is None:
        return ""
    low, high = cell.interval
    return f"{low:.4g} to {high:.4g}"


def _difference(cell: Cell | None, in_percent: bool) -> Text:
    """The difference with its interval: as it is, or in percent of the first model's figure."""
    found = None if cell is None else cell.difference
    if found is None:
        return Text("")
    value, interval, form = found.value, found.interval, "+.3g"
    if in_percent and found.relative is not None:
        value, interval, form = found.relative, found.relative_interval, "+.2%"
    if interval is None:
        return Text(f"{value:{form}}")
    low, high = interval
    # An interval around 0 is no difference that these rows could tell.
    return Text(f"{value:{form}} ({low:{form}} to {high:{form}})", style="dim" if low <= 0 <= high else "")


def _costs(comparison: Comparison) -> dict[str, list[str | None]]:
    costs = [model.cost for model in comparison.models]
    return {
        "weights, MiB": [f"{cost.weights_bytes / MIB:,.0f}" for cost in costs],
        "peak memory, MiB": [f"{cost.peak_bytes / MIB:,.0f}" for cost in costs],
        "scored tokens/s": [_speed(cost.scored_per_second) for cost in costs],
        "written tokens/s": [_speed(cost.generated_per_second) for cost in costs],
        "energy, J": ["not told" if cost.joules is None else f"{cost.joules:,.0f}" for cost in costs],
    }


def _speed(tokens: float | None) -> str | None:
    return None if tokens is None else f"{tokens:,.0f}"


def _notes(comparison: Comparison) -> list[str]:
    options = comparison.options
    lines = [
        f"{options.level:.0%} intervals over rows, {options.num_resamples:,} samples; differences are paired",
        _counts(comparison),
    ]
    for model in comparison.models:
        lines += [f"{model.name} without {task}: {reason}" for task, reason in model.left_out.items()]
    if any(model.cost.device == "cpu" for model in comparison.models):
        lines.append("memory is that of the whole process")
    return lines
