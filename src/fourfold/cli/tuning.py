"""The verb `fourfold tune`, and what it prints."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fourfold.cli.options import Json, Verbose
from fourfold.cli.terminal import print_json, quiet_libraries, reporting_errors
from fourfold.config import load_config

if TYPE_CHECKING:
    from fourfold.search.study import TrialRecord
    from fourfold.tuning import SearchResult

__all__ = ["tune"]

_STYLES = {"finished": "", "pruned": "dim", "refused": "dim", "failed": "red"}
_MOST_ROWS = 30


def tune(
    context: typer.Context,
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of the run, with a section `search:`.")],
    search: Annotated[Path | None, typer.Option(help="File with what to search, in place of the section.")] = None,
    trials: Annotated[
        int | None, typer.Option(min=1, help="Finished trials of the study; as search: n_trials.")
    ] = None,
    storage: Annotated[str | None, typer.Option(help="File or URL of the study; as search: storage.")] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Search for the best configuration: trials by Optuna. Started again, or several times at once, it goes on."""
    with reporting_errors(json):
        run_config = load_config(config, context.args)
        from fourfold.config.search import load_search, search_space

        asked = load_search(config, search, n_trials=trials, storage=storage)
        search_space(asked)
        quiet_libraries(verbose)
        from fourfold import tuning

        def after(record: TrialRecord) -> None:
            if json:
                print_json({"event": "trial", **vars(record)})
            else:
                typer.echo(_line(record))

        result = tuning.tune(run_config, asked, after=after)
        if json:
            print_json({"event": "result", **result.to_dict()})
        else:
            _print_study(result)


def _line(record: TrialRecord) -> str:
    figures = ", ".join(f"{name} {value:.5g}" for name, value in record.values.items())
    values = ", ".join(f"{key} {_shown(value)}" for key, value in record.params.items())
    took = "" if record.seconds is None else f", {record.seconds:.1f} s"
    return f"trial {record.number} {record.outcome}{took}: {figures or record.reason} ({values})"


def _shown(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "null" if value is None else str(value)


def _print_study(result: SearchResult) -> None:
    """The best trials first, then the others; and where everything lies."""
    keys = list(dict.fromkeys(key for record in result.trials for key in record.params))
    table = Table(box=None, pad_edge=False)
    for name in ("trial", "", *result.objectives, *keys, "s"):
        table.add_column(name, justify="left" if name == "" else "right", no_wrap=True)
    name, direction = next(iter(result.objectives.items()))
    sign = -1 if direction == "maximize" else 1

    def order(record: TrialRecord) -> tuple[bool, bool, float]:
        return record.number not in result.best, not record.values, sign * record.values.get(name, record.number)

    ordered = sorted(result.trials, key=order)
    for record in ordered[:_MOST_ROWS]:
        is_best = record.number in result.best
        table.add_row(
            f"> {record.number}" if is_best else str(record.number),
            record.outcome,
            *(_shown(record.values[each]) if record.values else "" for each in result.objectives),
            *(Text(_shown(record.params[key]) if key in record.params else "") for key in keys),
            "" if record.seconds is None else f"{record.seconds:.1f}",
            style="bold" if is_best else _STYLES.get(record.outcome),
        )
    console = Console()
    if not console.is_terminal:
        console = Console(width=140)
    console.print(table)
    if len(ordered) > _MOST_ROWS:
        typer.echo(f"and {len(ordered) - _MOST_ROWS} more in {result.output_dir / 'trials.csv'}")
    for path in result.configs.values():
        typer.echo(f"\nTrain it: fourfold train {path}" if len(result.configs) == 1 else f"fourfold train {path}")
    typer.echo(f"All of it on one page: {result.page}")
