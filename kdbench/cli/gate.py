"""The `kdbench gate` command. Slow imports happen inside the command."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from kdbench.cli.common import (
    RESULTS,
    DataDir,
    Methods,
    SuiteName,
    print_error,
    report_damaged,
    split_method_names,
    split_names,
)
from kdbench.errors import UserError

if TYPE_CHECKING:
    from kdbench.gate.command import GateReport, GateRequest

BASELINES = Path("results/gate")

BaselineFile = Annotated[
    Path | None, Option(help="File with the baseline. Default: results/gate/SUITE.json.")
]
Update = Annotated[
    bool, Option("--update", help="Replace the baseline after showing the differences.")
]
Architectures = Annotated[str, Option(help="Comma-separated list. Default: those of the baseline.")]
Seeds = Annotated[int | None, Option(min=1, help="Number of seeds. Default: that of the baseline.")]
Epochs = Annotated[
    int | None, Option(min=1, help="Number of epochs. Default: that of the baseline.")
]
Jobs = Annotated[int, Option(help="Number of concurrent runs, each in its own process.")]
KeptResults = Annotated[Path | None, Option(help="Keep the results of the runs in this folder.")]
Summary = Annotated[
    Path | None,
    Option(help="Append the table to this file as Markdown. Default: $GITHUB_STEP_SUMMARY."),
]
Agreement = Annotated[
    str | None,
    Option(help="Only print how the ranks of methods under SUITE and this suite correlate."),
]


def gate(
    suite: SuiteName = "digits",
    baseline: BaselineFile = None,
    update: Update = False,
    methods: Methods = "all",
    architectures: Architectures = "",
    seeds: Seeds = None,
    epochs: Epochs = None,
    data_dir: DataDir = None,
    jobs: Jobs = 1,
    results_dir: KeptResults = None,
    summary: Summary = None,
    agreement: Agreement = None,
) -> None:
    """Train a short schedule and compare it with a baseline; exit with 1 on a regression."""
    from kdbench.suite.load import load_suite

    names, chosen = split_method_names(methods), load_suite(suite)
    if agreement is not None:
        _print_agreement(results_dir or RESULTS, chosen.name, load_suite(agreement).name)
        return
    from kdbench.gate.command import GateRequest

    file = baseline or BASELINES / f"{chosen.name}.json"
    request = GateRequest(chosen, names, split_names(architectures) or None, seeds, epochs)
    report = _measure(request, file, update, results_dir, data_dir, jobs)
    print(report.render(), end="")
    summary_file = summary or os.environ.get("GITHUB_STEP_SUMMARY")
    if summary_file:
        _append(Path(summary_file), report.render(markdown=True))
    if update:
        from kdbench.gate.record import write_baseline

        write_baseline(file, report.new)
        print(f"Baseline written: {file}")
    elif not report.passed:
        raise typer.Exit(1)


def _measure(
    request: "GateRequest",
    file: Path,
    update: bool,
    results_dir: Path | None,
    data_dir: Path | None,
    jobs: int,
) -> "GateReport":
    """Run the gate. Keep the results only if a folder is given."""
    from kdbench.gate.command import run_gate
    from kdbench.launch.execution import Execution

    if results_dir is not None and any(results_dir.glob("*/*/*/seed*.json")):
        raise UserError(
            f"'{results_dir}' already holds results, which the gate would replace; name an empty "
            "folder with --results-dir."
        )
    with TemporaryDirectory(prefix="kdbench-gate-") as folder:
        results, runs = results_dir or Path(folder) / "results", Path(folder) / "runs"
        config = Execution(results, runs, data_dir, "off", jobs=jobs)
        return run_gate(request, file, config, update, print_error)


def _print_agreement(results: Path, short: str, full: str) -> None:
    from kdbench.report.analysis.schedule_agreement import agreement
    from kdbench.results.files import load_results

    good, damaged = load_results(results)
    print(agreement(good, short, full))
    if report_damaged(damaged):
        raise typer.Exit(2)


def _append(file: Path, text: str) -> None:
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise UserError(f"Cannot write '{file}': {error.strerror or error}.") from None
