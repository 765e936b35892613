"""The `kdbench bench` command. Slow imports happen inside the command."""

from typing import TYPE_CHECKING, Annotated

from rich.console import Console
from typer import Exit, Option

from kdbench.cli.common import (
    Compile,
    Methods,
    Precision,
    SuiteName,
    TableFormat,
    print_error,
    split_method_names,
    split_names,
)
from kdbench.errors import UserError, unknown_name_error
from kdbench.method_names import check_method_names

if TYPE_CHECKING:
    from kdbench.bench.record import Benchmark
    from kdbench.engine.spec import RunSpec


def bench(
    suite: SuiteName = "cifar100",
    methods: Methods = "all",
    architectures: Annotated[
        str, Option(help="Comma-separated list. Default: the suite's architecture.")
    ] = "",
    precision: Annotated[
        Precision | None, Option(help="Precision. Default: the suite's precision.")
    ] = None,
    compile_: Annotated[
        str,
        Option(
            "--compile",
            help="Comma-separated list of ways to run steps; each gives a row. 'auto' is the way "
            "of a short run.",
        ),
    ] = "auto",
    against: Annotated[str, Option(help="Method that ratios refer to.")] = "independent",
    rounds: Annotated[int, Option(help="Number of timed windows of each method.")] = 10,
    set_: Annotated[
        list[str] | None,
        Option("--set", help="Method option as METHOD.OPTION=VALUE; may be repeated."),
    ] = None,
    format_: Annotated[
        TableFormat, Option("--format", help="Output format.")
    ] = TableFormat.terminal,
) -> None:
    """Measure the time and memory of a training step of each method, on random images."""
    from kdbench.suite.load import load_suite

    names, chosen, modes = split_method_names(methods), load_suite(suite), compile_modes(compile_)
    check_method_names([against])
    from kdbench.bench.tables import render
    from kdbench.launch.plan import make_specs

    if precision is not None:
        chosen = chosen.with_precision(precision.value)
    specs = make_specs(chosen, names, split_names(architectures), settings=set_ or [])
    benchmark, failed = _measure(specs, modes, rounds, against)
    print(render(benchmark, format_.value), end="")
    if failed:
        raise Exit(1)


def _measure(
    specs: "list[RunSpec]", modes: list[Compile], rounds: int, against: str
) -> "tuple[Benchmark, bool]":
    """Run the benchmark with a progress bar; return it and True if a method failed."""
    from rich.progress import Progress

    from kdbench.bench.command import bench as run_benchmark

    console = Console(stderr=True)
    failures: list[str] = []

    def on_failure(message: str) -> None:
        failures.append(message)
        print_error(message)

    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("measuring", total=1)
        benchmark = run_benchmark(
            specs,
            [mode.value for mode in modes],
            rounds,
            against,
            lambda activity, share: progress.update(task, description=activity, completed=share),
            print_error,
            on_failure,
        )
    return benchmark, bool(failures)


def compile_modes(text: str) -> list[Compile]:
    """Return the ways of running steps in a comma-separated list.

    Raises:
        UserError: The list is empty or names an unknown way.
    """
    modes = [mode.value for mode in Compile]
    if not split_names(text):
        raise UserError(f"--compile is empty; choose from: {', '.join(modes)}.")
    for name in split_names(text):
        if name not in modes:
            raise unknown_name_error("way to run steps", name, modes)
    return [Compile(name) for name in split_names(text)]
