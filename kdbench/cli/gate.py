"""`kdbench gate`. What takes long to import is imported by the command."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

import typer
from typer import Option

from kdbench.cli.common import (
    RESULTS,
    DataDir,
    Methods,
    SuiteName,
    complain_of,
    methods_of,
    names_of,
    print_error,
)
from kdbench.errors import UserError

BASELINES = Path("results/gate")


def gate(
    suite: SuiteName = "digits",
    baseline: Annotated[
        Path | None, Option(help="The stored numbers; default: results/gate/SUITE.json.")
    ] = None,
    update: Annotated[
        bool, Option("--update", help="Write the baseline anew, once the differences are shown.")
    ] = False,
    methods: Methods = "all",
    architectures: Annotated[str, Option(help="Comma list; default: the baseline's.")] = "",
    seeds: Annotated[
        int | None, Option(min=1, help="Seeds 0 to N - 1; default: the baseline's.")
    ] = None,
    epochs: Annotated[int | None, Option(min=1, help="Default: the baseline's.")] = None,
    data_dir: DataDir = None,
    jobs: Annotated[int, Option(help="Runs at a time, as processes of their own.")] = 1,
    results_dir: Annotated[
        Path | None, Option(help="Keep the runs' results here; default: they are thrown away.")
    ] = None,
    summary: Annotated[
        Path | None,
        Option(help="Append the table as markdown; default: $GITHUB_STEP_SUMMARY where set."),
    ] = None,
    agreement: Annotated[
        str | None,
        Option(help="Only print how SUITE's ranks of methods correlate with those of this one."),
    ] = None,
) -> None:
    """Train a short schedule and compare it with a baseline; exit code 1 on a regression."""
    from kdbench.suite.load import load_suite

    names, chosen = methods_of(methods), load_suite(suite)
    if agreement is not None:
        _print_agreement(results_dir or RESULTS, chosen.name, load_suite(agreement).name)
        return
    from kdbench.gate.command import Asked
    from kdbench.gate.command import gate as measure
    from kdbench.gate.record import write_baseline
    from kdbench.launch.execution import Execution

    if results_dir is not None and any(results_dir.glob("*/*/*/seed*.json")):
        raise UserError(
            f"'{results_dir}' holds results, which the gate's own would replace; name an empty "
            "folder with --results-dir."
        )
    file = baseline or BASELINES / f"{chosen.name}.json"
    asked = Asked(chosen, names, names_of(architectures) or None, seeds, epochs)
    with TemporaryDirectory(prefix="kdbench-gate-") as folder:
        results, runs = results_dir or Path(folder) / "results", Path(folder) / "runs"
        how = Execution(results, runs, data_dir, "off", jobs=jobs)
        done = measure(asked, file, how, update, print_error)
    print(done.render(), end="")
    where = summary or os.environ.get("GITHUB_STEP_SUMMARY")
    if where:
        _append(Path(where), done.render(markdown=True))
    if update:
        write_baseline(file, done.new)
        print(f"Baseline written: {file}")
    elif not done.passed:
        raise typer.Exit(1)


def _print_agreement(results: Path, short: str, full: str) -> None:
    from kdbench.report.analysis.schedule_agreement import agreement
    from kdbench.results.files import load_results

    good, damaged = load_results(results)
    print(agreement(good, short, full))
    if complain_of(damaged):
        raise typer.Exit(2)


def _append(file: Path, text: str) -> None:
    try:
        with file.open("a", encoding="utf-8") as stream:
            stream.write(text)
    except OSError as error:
        raise UserError(f"Cannot write '{file}': {error.strerror or error}.") from None
