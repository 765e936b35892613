"""The `kdbench export` and `kdbench evaluate` commands. Slow imports happen inside the commands."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Argument, Option

from kdbench.cli.common import RESULTS, RUNS, DataDir, ResultsDir, RunsDir, Workers, print_error
from kdbench.errors import pluralize

if TYPE_CHECKING:
    from kdbench.results.schema import Metrics


class ExportFormat(StrEnum):
    """File format of an exported network."""

    safetensors = "safetensors"
    onnx = "onnx"
    pt2 = "pt2"


def export(
    run: Annotated[
        str, Argument(help="Result file, run folder, or SUITE/ARCHITECTURE/METHOD/seed0.")
    ],
    format_: Annotated[
        ExportFormat, Option("--format", help="File format.")
    ] = ExportFormat.safetensors,
    output: Annotated[Path, Option(help="File to write, or a folder for it.")] = Path(),
    method: Annotated[
        Path | None,
        Option(help="File of the method, if it neither comes with kdbench nor is installed."),
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace existing files.")] = False,
    results_dir: ResultsDir = RESULTS,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Export the network that a run deploys, with its preprocessing and a model card."""
    from rich.filesize import decimal

    from kdbench.export.student import find_run, load_run
    from kdbench.export.write import write_export

    finished = load_run(*find_run(run, results_dir, runs_dir), method)
    exported = write_export(finished, format_.value, output, overwrite)
    print(f"Wrote '{exported.file}' ({decimal(exported.bytes)}) and its card '{exported.card}'.")


def evaluate(
    file: Annotated[
        Path,
        Argument(
            help="File from `kdbench export`. A .pt2 file can run code: use trusted files only."
        ),
    ],
    suite: Annotated[
        str | None,
        Option(help="Name of a suite, or a TOML file. Default: the suite of the exported run."),
    ] = None,
    data_dir: DataDir = None,
    workers: Workers = None,
) -> None:
    """Evaluate an exported file on a suite's test images, and compare it with its run."""
    from kdbench.engine.device import make_accelerator
    from kdbench.export.evaluate import evaluate_file
    from kdbench.export.student import format_label
    from kdbench.launch.shares import cores

    processes = max(1, cores() - 1) if workers is None else workers
    evaluation = evaluate_file(file, suite, data_dir, make_accelerator().device, processes)
    for name, reason in evaluation.undecodable.items():
        print_error(f"'{name}' cannot be decoded and counts as wrong: {reason}.")
    images = pluralize(evaluation.images, "image")
    print(f"{file.name} on {evaluation.suite}: {_format_metrics(evaluation.metrics)}, {images}.")
    card = evaluation.card
    metrics = _format_metrics(card.metrics)
    print(f"Exported from {format_label(card.identity)}: {metrics}, in {card.precision}.")
    if evaluation.agrees is None:
        print("The run used another suite, so there is nothing to compare.")
    elif evaluation.agrees:
        print("Top-1 is equal.")
    else:
        print_error(
            "Top-1 differs: the device or precision is another one, or the network has changed."
        )
        raise typer.Exit(1)


def _format_metrics(metrics: "Metrics") -> str:
    return f"top-1 {metrics.top1:.2f} %, top-5 {metrics.top5:.2f} %, loss {metrics.loss:.4f}"
