"""`kdbench bench`. What takes long to import is imported by the command."""

from typing import Annotated

from rich.console import Console
from typer import Exit, Option

from kdbench.cli.common import (
    Compile,
    Methods,
    Precision,
    SuiteName,
    TableFormat,
    methods_of,
    names_of,
    print_error,
)
from kdbench.errors import UserError, unknown
from kdbench.method_names import check_method_names


def bench(
    suite: SuiteName = "cifar100",
    methods: Methods = "all",
    architectures: Annotated[str, Option(help="Comma list; default: the suite's.")] = "",
    precision: Annotated[
        Precision | None, Option(help="Another precision than the suite's.")
    ] = None,
    compile_: Annotated[
        str,
        Option(
            "--compile",
            help="Comma list of ways to run steps; each is a row. 'auto': as in a short run.",
        ),
    ] = "auto",
    against: Annotated[str, Option(help="Method that ratios refer to.")] = "independent",
    rounds: Annotated[int, Option(help="Timed windows of each method, in turn.")] = 10,
    set_: Annotated[
        list[str] | None, Option("--set", help="METHOD.OPTION=VALUE; may be repeated.")
    ] = None,
    format_: Annotated[TableFormat, Option("--format")] = TableFormat.terminal,
) -> None:
    """Measure what a training step of each method costs, on random images."""
    from kdbench.suite.load import load_suite

    names, chosen, how = methods_of(methods), load_suite(suite), ways(compile_)
    check_method_names([against])
    from rich.progress import Progress

    from kdbench.bench.command import bench as measure
    from kdbench.bench.tables import render
    from kdbench.launch.plan import make_specs

    if precision is not None:
        chosen = chosen.with_precision(precision.value)
    specs = make_specs(chosen, names, names_of(architectures), settings=set_ or [])
    console = Console(stderr=True)
    failures: list[str] = []

    def fail(sentence: str) -> None:
        failures.append(sentence)
        print_error(sentence)

    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("measuring", total=1)
        measured = measure(
            specs,
            [way.value for way in how],
            rounds,
            against,
            lambda what, share: progress.update(task, description=what, completed=share),
            print_error,
            fail,
        )
    print(render(measured, format_.value), end="")
    if failures:
        raise Exit(1)


def ways(text: str) -> list[Compile]:
    ways = [way.value for way in Compile]
    if not names_of(text):
        raise UserError(f"--compile names no way to run steps; choose from: {', '.join(ways)}.")
    for name in names_of(text):
        if name not in ways:
            raise unknown("way to run steps", name, ways)
    return [Compile(name) for name in names_of(text)]
