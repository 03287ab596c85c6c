"""The verbs. Each reads its words, calls the pipeline, and prints what it gave.

The pipeline, and with it torch, is imported inside the verbs: `fourfold --help` and a fault in a
configuration are to take no seconds.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from fourfold.cli.chatting import chat
from fourfold.cli.environment import let_segments_grow, print_environment
from fourfold.cli.evaluating import EvaluateCommand, evaluate
from fourfold.cli.exporting import export
from fourfold.cli.launching import launch
from fourfold.cli.options import BoundKl, BoundTop1, Json, Verbose
from fourfold.cli.serving import serve
from fourfold.cli.terminal import (
    is_main,
    print_json,
    print_result,
    progress_style,
    quiet_libraries,
    reporting_errors,
    stdout_for_result,
)
from fourfold.cli.tuning import tune
from fourfold.config import RunConfig, load_config
from fourfold.environment import gather

__all__ = ["app", "main"]

app = typer.Typer(
    name="fourfold",
    help="Fine-tune large language models in a quarter of the memory, and ship what was trained.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,  # a fault of ours shows Python's own traceback, without every local
)

# Words that are no option of the verb are keys of the configuration.
WITH_OVERRIDES: dict[str, Any] = {"allow_extra_args": True, "ignore_unknown_options": True}
OVERRIDES = (
    "Any key of the configuration can follow, and wins over the file: [bold]--learning_rate 1e-4 --packing "
    "--no-load_in_4bit[/bold]. [bold]python -m fourfold.config[/bold] lists them all."
)

ConfigFile = Annotated[str, typer.Argument(metavar="CONFIG", help="YAML file of the run, or the folder of a run.")]


class Onto(StrEnum):
    """The weights that an adapter is merged onto."""

    dequantized = "dequantized"
    original = "original"


class Shape(StrEnum):
    """The shapes of `fourfold.training.bench.SHAPES`, named here so that `--help` need not import it."""

    eight_b = "8b"
    one_b = "1b"
    tiny = "tiny"


def _read_config(config: str, overrides: list[str]) -> RunConfig:
    """A CONFIG that is an option stands for none: then all keys come from the command line."""
    if config.startswith("--"):
        return load_config(None, [config, *overrides])
    return load_config(config, overrides)


@app.command(context_settings=WITH_OVERRIDES, epilog=OVERRIDES)
def train(
    context: typer.Context,
    config: ConfigFile,
    num_processes: Annotated[
        int | None, typer.Option("--num_processes", min=1, help="GPUs of this machine to train on, by torchrun.")
    ] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Fine-tune a model: read CONFIG, quantize, adapt, train, evaluate."""
    with reporting_errors(json):
        run_config = _read_config(config, context.args)
        if num_processes is not None and num_processes > 1:
            flags = ["--json"] * json + ["--verbose"] * verbose
            launch(["train", config, *context.args, *flags], num_processes)
        quiet_libraries(verbose)
        from fourfold import pipeline

        run = pipeline.train(run_config, progress=progress_style(json))
        if not is_main():
            return
        if json:
            # The last of the progress's JSON lines.
            print_json({"event": "result", "output_dir": run.output_dir, "metrics": run.metrics})
            return
        print_result(run.metrics, as_json=False)
        typer.echo(f"\nThe run lies in {run.output_dir}. Talk to it: fourfold chat {run.output_dir}")
        typer.echo(f"All of it on one page: fourfold report {run.output_dir} --open")


@app.command(context_settings=WITH_OVERRIDES, epilog=OVERRIDES)
def data(
    context: typer.Context,
    config: ConfigFile,
    rows: Annotated[int, typer.Option(min=0, help="Rows to show.")] = 3,
    seed: Annotated[int | None, typer.Option(min=0, help="Draw them at random; without it, the first.")] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Show rows as the model will see them, and what is wrong with the data. No model is loaded."""
    with reporting_errors(json):
        run_config = _read_config(config, context.args)
        quiet_libraries(verbose)
        from fourfold.cli.data import print_data
        from fourfold.examining import examine_data

        with stdout_for_result(json):
            seen = examine_data(run_config, rows, seed)
        if json:
            print_json(seen.to_dict())
        else:
            print_data(seen)
        if not seen.is_sound:
            raise typer.Exit(1)


app.command(cls=EvaluateCommand, context_settings=WITH_OVERRIDES, epilog=OVERRIDES)(evaluate)


@app.command(context_settings=WITH_OVERRIDES, epilog=OVERRIDES)
def quantize(
    context: typer.Context,
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of a 16-bit checkpoint, or its name on the hub.")
    ],
    out: Annotated[
        str | None,
        typer.Argument(metavar="OUT", help="Folder for the quantized checkpoint; not needed with --inspect."),
    ] = None,
    inspect: Annotated[
        bool,
        typer.Option("--inspect", help="Print each layer's error, signal-to-noise and bits per weight."),
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option(help="With --inspect: draw the weights' histogram against the code points into this file."),
    ] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Write a quantized checkpoint of MODEL, or look at what quantizing does to it."""
    overrides = list(context.args)
    if out is not None and out.startswith("--"):
        # Without OUT, the first key of the configuration stands in its place.
        overrides.insert(0, out)
        out = None
    if out is None and not inspect:
        raise typer.BadParameter("give a folder to write to, or --inspect", param_hint="OUT")
    if picture is not None and not inspect:
        raise typer.BadParameter("needs --inspect", param_hint="--picture")
    with reporting_errors(json):
        config = load_config(None, [f"--model_name_or_path={model}", *overrides])
        quiet_libraries(verbose)
        from fourfold import pipeline

        results: dict[str, object] = {}
        with stdout_for_result(json):
            if inspect:
                results["inspection"] = inspection = pipeline.inspect(config)
                if picture is not None:
                    inspection.save_picture(picture)
            if out is not None:
                results["checkpoint"] = pipeline.quantize_checkpoint(config, Path(out))
        if json:
            print_json(next(iter(results.values())) if len(results) == 1 else results)
            return
        for result in results.values():
            print_result(result, as_json=False)


app.command(context_settings=WITH_OVERRIDES, epilog=OVERRIDES)(tune)


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of a run or of its adapter.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder for the merged 16-bit checkpoint.")],
    onto: Annotated[
        Onto,
        typer.Option(
            help="dequantized: the 4-bit weights that were trained on. original: the 16-bit ones, which "
            "were not, so that the answers change a little."
        ),
    ] = Onto.dequantized,
    bound: Annotated[
        float | None,
        typer.Option(min=0, help="Fail if the merged model's logits differ by more than this, relatively."),
    ] = None,
    bound_kl: BoundKl = None,
    bound_top1: BoundTop1 = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Merge an adapter into its model, and prove that the result answers as the trained one."""
    with reporting_errors(json):
        quiet_libraries(verbose)
        from fourfold import pipeline

        with stdout_for_result(json):
            report = pipeline.merge(
                adapter, Path(out), onto=onto.value, bound=bound, bound_kl=bound_kl, bound_top1=bound_top1
            )
        print_result(report, json)


app.command()(export)
app.command()(serve)


app.command()(chat)


@app.command(context_settings=WITH_OVERRIDES, epilog=OVERRIDES)
def plan(
    context: typer.Context,
    config: ConfigFile,
    gpu: Annotated[
        str | None,
        typer.Option(help="A GPU's name or memory (H200, 24GB, 2xH200); without it, the one here, up to the limit."),
    ] = None,
    gpus: Annotated[int | None, typer.Option(help="How many of them.")] = None,
    host: Annotated[
        str | None, typer.Option(help="Host memory that may be used (64GB); without it, what is free here.")
    ] = None,
    compare: Annotated[bool, typer.Option("--compare", help="Strategies side by side.")] = False,
    picture: Annotated[Path | None, typer.Option(help="With --compare: draw it (.png, .svg, .pdf).")] = None,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Say what fits a GPU, which of it is the fastest, and what each byte is for. Nothing is loaded."""
    with reporting_errors(json):
        run_config = _read_config(config, context.args)
        quiet_libraries(verbose)
        from fourfold import planning
        from fourfold.cli.planning import print_comparison, print_plan
        from fourfold.config.options import memory_limit

        card, num_gpus = planning.find_gpus(gpu, gpus, memory_limit(run_config))
        host_bytes = planning.find_host(host, is_here=gpu is None)
        if compare:
            print_comparison(planning.compare(run_config, card, host_bytes, num_gpus), picture, json)
        elif not print_plan(run_config, card, num_gpus, host_bytes, json):
            raise typer.Exit(1)


@app.command(context_settings=WITH_OVERRIDES, epilog=OVERRIDES)
def bench(
    context: typer.Context,
    config: Annotated[
        str | None,
        typer.Argument(metavar="CONFIG", help="YAML file of a run, whose model is measured; or give --shape."),
    ] = None,
    shape: Annotated[
        Shape | None, typer.Option(help="Measure a model of this shape with random weights, with no CONFIG's.")
    ] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Rows a step; without it CONFIG's, or 4 with --shape.")
    ] = None,
    seq: Annotated[
        int | None, typer.Option(min=2, help="Tokens a row; without it CONFIG's, or 2048 with --shape.")
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Measured steps of each row, after two that are not.")] = 6,
    json: Json = False,
    verbose: Verbose = False,
) -> None:
    """Measure training on this machine: tokens a second and peak memory of each recomputation policy."""
    words = list(context.args)
    if config is not None and config.startswith("--"):
        # Without CONFIG, the first key of the configuration stands in its place.
        words.insert(0, config)
        config = None
    if shape is not None and config is not None:
        raise typer.BadParameter("give a CONFIG or --shape, not both", param_hint="--shape")
    with reporting_errors(json):
        if shape is not None:
            words = [f"--model_name_or_path={shape.value}", *words]
            batch, seq = batch or 4, seq or 2048
        run_config = load_config(config, words)
        quiet_libraries(verbose)
        from fourfold.config import options as choices
        from fourfold.models.loading import load_model
        from fourfold.models.preparing import prepare
        from fourfold.training import bench as measuring

        options = choices.load_options(run_config, for_training=True, streams=True)
        with stdout_for_result(json):
            if shape is None:
                model = load_model(run_config.model_name_or_path, **options)
            else:
                model = measuring.random_model(
                    shape.value, options["quantization"], options["dtype"], choices.device(run_config)
                )
            report = measuring.bench(
                prepare(
                    model,
                    choices.lora_config(run_config),
                    fused=run_config.fused_blocks,
                    cuda_graphs=run_config.cuda_graphs,
                    **choices.stream_options(run_config),
                ),
                batch=batch or run_config.per_device_train_batch_size,
                seq=seq or run_config.max_length,
                steps=steps,
            )
        print_result(report, json)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a run, ended or not.")],
    open_: Annotated[bool, typer.Option("--open", help="Show it in the browser.")] = False,
    json: Json = False,
) -> None:
    """Write the page of a run anew from its folder: report.html, which needs no other file and no network."""
    with reporting_errors(json):
        quiet_libraries(verbose=False)
        from fourfold.recording import write_page

        page = write_page(run)
        if json:
            print_json({"page": page})
        else:
            typer.echo(page)
        if open_:
            typer.launch(str(page.resolve()))


@app.command()
def env(json: Json = False) -> None:
    """Show versions, processor, memory and GPUs, and what to do if something is missing."""
    with reporting_errors(json):
        environment = gather()
        if json:
            print_json(environment)
        else:
            print_environment(environment)


def main() -> None:
    """Entry point of the `fourfold` command."""
    let_segments_grow()
    app()
