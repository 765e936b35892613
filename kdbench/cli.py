"""Commands: parse, call, print. What takes long to import is imported by the command."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from typer import Argument, Option

from kdbench import cli_data, cluster_cli
from kdbench.cluster_cli import RUNS, names_of
from kdbench.errors import PlanAbandonedError, PlanInterruptedError, UserError, unknown

if TYPE_CHECKING:
    from kdbench.store import Result

app = typer.Typer(
    name="kdbench",
    help="Compare online knowledge-distillation methods on identical schedules.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_data.app, name="data")

RESULTS = Path("results")

ResultsDir = Annotated[Path, Option(help="Where results lie.")]


class Precision(StrEnum):
    """fp32 is TF32 on a GPU that has it."""

    fp32 = "fp32"
    bf16 = "bf16"


class Compile(StrEnum):
    """How training steps run."""

    auto = "auto"
    off = "off"
    inductor = "inductor"
    graph = "graph"
    both = "inductor+graph"


class BenchFormat(StrEnum):
    """How `kdbench bench` prints."""

    terminal = "terminal"
    markdown = "markdown"
    json = "json"


class ReportFormat(StrEnum):
    """How `kdbench report` prints."""

    terminal = "terminal"
    markdown = "markdown"
    csv = "csv"
    json = "json"


@app.command()
def run(
    suite: Annotated[str, Option(help="Name of a suite, or a TOML file.")] = "digits",
    methods: Annotated[str, Option(help="Comma list of names or .py files, or 'all'.")] = "all",
    architectures: Annotated[
        str, Option(help="Comma list; A+B mixes them, the student last.")
    ] = "",
    seeds: Annotated[int | None, Option(help="Seeds 0 to N - 1; default: the suite's.")] = None,
    epochs: Annotated[
        int | None, Option(help="Another number of epochs; the schedule keeps its shape.")
    ] = None,
    precision: Annotated[
        Precision | None, Option(help="Another precision than the suite's.")
    ] = None,
    data_dir: Annotated[
        Path | None, Option(help="Folder with the data set; default: $KDBENCH_DATA or the hub.")
    ] = None,
    compile_: Annotated[
        Compile, Option("--compile", help="How steps run; auto: what repays itself.")
    ] = Compile.auto,
    jobs: Annotated[
        int, Option(help="Runs at a time, as processes of their own; rates are then no measure.")
    ] = 1,
    num_processes: Annotated[
        int | None, Option(help="Processes that train each run together, one per GPU.")
    ] = None,
    workers: Annotated[
        int | None,
        Option(help="Processes that decode images, where a suite's images stay encoded."),
    ] = None,
    set_: Annotated[
        list[str] | None, Option("--set", help="METHOD.OPTION=VALUE; may be repeated.")
    ] = None,
    results_dir: ResultsDir = RESULTS,
    runs_dir: Annotated[Path, Option(help="Where checkpoints and logs go.")] = RUNS,
    overwrite: Annotated[bool, Option("--overwrite", help="Run again what has a result.")] = False,
    overwrite_stale: Annotated[
        bool, Option("--overwrite-stale", help="Run again what another version made.")
    ] = False,
    tensorboard: Annotated[
        bool, Option(help="Also log to TensorBoard, in the runs folder.")
    ] = False,
    dry_run: Annotated[bool, Option(help="Print the plan and its estimated time only.")] = False,
    cluster: cluster_cli.ClusterOption = None,
    partition: cluster_cli.Partition = None,
    gpus: cluster_cli.Gpus = None,
    cpus: cluster_cli.Cpus = None,
    time: cluster_cli.Time = None,
    memory: cluster_cli.Memory = None,
    constraint: cluster_cli.Constraint = None,
    max_parallel: cluster_cli.Parallel = None,
) -> None:
    """Train methods under a suite's schedule, then print the leaderboard."""
    from kdbench.data import is_cached, locate
    from kdbench.launch.execution import Execution, check_processes
    from kdbench.launch.local import execute
    from kdbench.launch.place import silent
    from kdbench.launch.plan import agree, make_plan
    from kdbench.launch.ranks import together
    from kdbench.suite import load_suite

    code = 0
    with together(num_processes, _complain) as ranks, silent(not ranks.is_main):
        how = Execution(
            results_dir,
            runs_dir,
            data_dir,
            compile_.value,
            overwrite=overwrite,
            tensorboard=tensorboard,
            jobs=jobs,
            processes=ranks.count if num_processes is None else num_processes,
            workers=workers,
        )
        asked = cluster_cli.request(
            cluster,
            how,
            partition=partition,
            gpus=gpus,
            cpus=cpus,
            time=time,
            memory=memory,
            constraint=constraint,
            parallel=max_parallel,
        )
        chosen = load_suite(suite)
        if epochs is not None:
            chosen = chosen.with_epochs(epochs)
        if precision is not None:
            chosen = chosen.with_precision(precision.value)
        check_processes(chosen, how.processes, ranks)
        broken: list[UserError] = []

        def on_broken(error: UserError) -> None:
            broken.append(error)
            _complain(str(error))

        plan = make_plan(
            chosen,
            names_of(methods),
            names_of(architectures),
            seeds,
            set_ or [],
            results_dir,
            # The results that count are those of the main process.
            "all" if overwrite or not ranks.is_main else "stale" if overwrite_stale else "nothing",
            on_broken,
        )
        plan = agree(plan, ranks)
        if dry_run and plan:
            from kdbench.launch.preview import preview

            source = locate(chosen.data, data_dir, is_cached)
            if ranks.is_main:
                print(preview(plan, source, results_dir, compile_.value, jobs, how.processes))
            if cluster is not None:
                print(cluster_cli.preview(plan, cluster, asked))
        elif plan and cluster is not None:
            cluster_cli.submit(plan, how, cluster, asked)
            code = 1 if broken else 0
        elif plan:
            new = execute(plan, how, ranks)
            if ranks.is_main:
                _print_report(results_dir, chosen.name, ReportFormat.terminal, "baseline")
            code = 1 if _complain_of_unfinished(new) or broken else 0
        else:
            code = 2
    if code:
        raise typer.Exit(code)


@app.command()
def report(
    suite: Annotated[str | None, Option(help="One suite only.")] = None,
    format_: Annotated[ReportFormat, Option("--format")] = ReportFormat.terminal,
    against: Annotated[str, Option(help="Method that differences refer to.")] = "baseline",
    results_dir: ResultsDir = RESULTS,
) -> None:
    """Print the leaderboards of all results."""
    if _print_report(results_dir, suite, format_, against):
        raise typer.Exit(2)


@app.command()
def bench(
    suite: Annotated[str, Option(help="Name of a suite, or a TOML file.")] = "cifar100",
    methods: Annotated[str, Option(help="Comma list of names or .py files, or 'all'.")] = "all",
    architectures: Annotated[str, Option(help="Comma list; default: the suite's.")] = "",
    precision: Annotated[
        Precision | None, Option(help="Another precision than the suite's.")
    ] = None,
    compile_: Annotated[
        str, Option("--compile", help="Comma list of ways to run steps; each is a row.")
    ] = "auto",
    against: Annotated[str, Option(help="Method that ratios refer to.")] = "independent",
    rounds: Annotated[int, Option(help="Timed windows of each method, in turn.")] = 10,
    set_: Annotated[
        list[str] | None, Option("--set", help="METHOD.OPTION=VALUE; may be repeated.")
    ] = None,
    format_: Annotated[BenchFormat, Option("--format")] = BenchFormat.terminal,
) -> None:
    """Measure what a training step of each method costs, on random images."""
    from rich.progress import Progress

    from kdbench.bench.command import bench as measure
    from kdbench.bench.tables import render
    from kdbench.launch.plan import make_specs
    from kdbench.suite import load_suite

    chosen = load_suite(suite)
    if precision is not None:
        chosen = chosen.with_precision(precision.value)
    specs = make_specs(chosen, names_of(methods), names_of(architectures), settings=set_ or [])
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("measuring", total=1)
        measured = measure(
            specs,
            [way.value for way in _ways(compile_)],
            rounds,
            against,
            lambda what, share: progress.update(task, description=what, completed=share),
            _complain,
        )
    print(render(measured, format_.value), end="")


@app.command()
def check(
    methods: Annotated[
        list[str] | None, Argument(metavar="[METHOD or FILE.py]...", help="Names or .py files.")
    ] = None,
    all_: Annotated[bool, Option("--all", help="Every method that is found.")] = False,
) -> None:
    """Test methods against the contract, on the CPU, without data."""
    from kdbench.check.command import check_methods, table
    from kdbench.discovery import find_methods

    if bool(methods) == all_:
        raise UserError("Name methods or files to check, or give --all.")
    broken: list[UserError] = []
    entries = find_methods(["all"] if all_ else methods or [], broken.append)
    with Console(stderr=True).status("checking") as status:
        outcomes = check_methods(entries, on_check=status.update)
    if outcomes:
        print(table(outcomes))
    for error in broken:
        _complain(str(error))
    if broken or any(outcome.result == "FAILED" for outcome in outcomes):
        raise typer.Exit(1)


@app.command()
def new(
    name: Annotated[str, Argument(help="Name of the method; the file is NAME.py.")],
) -> None:
    """Write a working one-file method to start from, in this folder."""
    from kdbench.discovery import method_names
    from kdbench.new import write_method

    file = write_method(name, Path(), set(method_names()))
    print(f"Wrote {file}. Next: kdbench check ./{file}")
    print(f"               then: kdbench run --methods ./{file},baseline")


app.command()(cluster_cli.status)
app.command()(cluster_cli.cancel)


@app.command(name="list")
def list_() -> None:
    """Print suites, methods and architectures."""
    from kdbench.report.listing import listing

    print(listing())


def main() -> None:
    """Entry point: errors of the user become one sentence and exit code 2."""
    from kdbench.launch.place import Place, silent

    speaks = True
    try:
        place = Place.of_this_process()
        speaks = place.local_rank == 0  # one of those that a launcher started on a machine
        with silent(not speaks):
            app()
    except (UserError, PlanAbandonedError, PlanInterruptedError) as error:
        if speaks:
            _complain(str(error))
        sys.exit(error.exit_code)


def _print_report(results: Path, suite: str | None, form: ReportFormat, against: str) -> bool:
    """Whether a damaged file was left out."""
    from kdbench.report.command import make_report

    made = make_report(results, suite, form.value, against)
    print(made.text, end="")
    for damaged in made.damaged:
        _complain(f"'{damaged.file}' is no valid result and was left out: {damaged.reason}.")
    return bool(made.damaged)


def _complain_of_unfinished(results: "list[Result]") -> bool:
    """Whether there are any."""
    unfinished = [result for result in results if result.status != "finished"]
    for result in unfinished:
        identity = result.identity
        name = f"{identity.method} {identity.architecture} seed {identity.seed}"
        _complain(f"{name} {result.status}: {result.reason}.")
    return bool(unfinished)


def _ways(text: str) -> list[Compile]:
    ways = [way.value for way in Compile]
    if not names_of(text):
        raise UserError(f"--compile names no way to run steps; choose from: {', '.join(ways)}.")
    for name in names_of(text):
        if name not in ways:
            raise unknown("way to run steps", name, ways)
    return [Compile(name) for name in names_of(text)]


def _complain(message: str) -> None:
    Console(stderr=True, soft_wrap=True).print(f"kdbench: {message}", markup=False, highlight=False)
