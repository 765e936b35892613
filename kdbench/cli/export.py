"""`kdbench export` and `kdbench evaluate`. What takes long to import is imported by the command."""

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
    """What `kdbench export` writes."""

    safetensors = "safetensors"
    onnx = "onnx"
    pt2 = "pt2"


def export(
    run: Annotated[
        str, Argument(help="Result file, run folder, or SUITE/ARCHITECTURE/METHOD/seed0.")
    ],
    format_: Annotated[ExportFormat, Option("--format")] = ExportFormat.safetensors,
    output: Annotated[Path, Option(help="File or folder.")] = Path(),
    method: Annotated[
        Path | None, Option(help="Method file, where it neither ships nor is installed.")
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the file.")] = False,
    results_dir: ResultsDir = RESULTS,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Write the network that a run deploys, with its preprocessing and a model card."""
    from rich.filesize import decimal

    from kdbench.export.student import find, load
    from kdbench.export.write import write

    finished = load(*find(run, results_dir, runs_dir), method)
    written = write(finished, format_.value, output, overwrite)
    print(f"Wrote '{written.file}' ({decimal(written.bytes)}) and its card '{written.card}'.")


def evaluate(
    file: Annotated[Path, Argument(help="Written by `kdbench export`; .pt2 runs code: trust it.")],
    suite: Annotated[
        str | None, Option(help="Name of a suite, or a TOML file; default: the file's.")
    ] = None,
    data_dir: DataDir = None,
    workers: Workers = None,
) -> None:
    """Measure an exported file on a suite's test images, and compare it with its run."""
    from kdbench.engine.device import make_accelerator
    from kdbench.export.evaluate import evaluate_file
    from kdbench.export.student import label
    from kdbench.launch.shares import cores

    processes = max(1, cores() - 1) if workers is None else workers
    measured = evaluate_file(file, suite, data_dir, make_accelerator().device, processes)
    for name, reason in measured.undecodable.items():
        print_error(f"'{name}' counts as wrong: {reason}.")
    images = pluralize(measured.images, "image")
    print(f"{file.name} on {measured.suite}: {_described(measured.metrics)}, {images}.")
    card = measured.card
    print(f"Exported from {label(card.identity)}: {_described(card.metrics)}, in {card.precision}.")
    if measured.agrees is None:
        print("That was another suite: nothing to compare.")
    elif measured.agrees:
        print("They agree in top-1.")
    else:
        print_error("they differ in top-1: another device or precision, or another network.")
        raise typer.Exit(1)


def _described(metrics: "Metrics") -> str:
    return f"top-1 {metrics.top1:.2f} %, top-5 {metrics.top5:.2f} %, loss {metrics.loss:.4f}"
