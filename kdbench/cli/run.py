"""`kdbench run`. What takes long to import is imported by the command."""

import contextlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer import Option

from kdbench.cli import cluster as cluster_options
from kdbench.cli.common import (
    RESULTS,
    RUNS,
    Compile,
    DataDir,
    Methods,
    Precision,
    ResultsDir,
    SuiteName,
    Workers,
    names_of,
    print_error,
)
from kdbench.cli.report import ReportFormat, print_report
from kdbench.errors import UserError
from kdbench.launch.place import Place, silent
from kdbench.method_names import check_method_names

if TYPE_CHECKING:
    from kdbench.launch.plan import PlannedRun
    from kdbench.results.schema import Result


def run(
    suite: SuiteName = "digits",
    methods: Methods = "all",
    architectures: Annotated[
        str, Option(help="Comma list; A+B mixes them, the student last.")
    ] = "",
    seeds: Annotated[int | None, Option(help="Seeds 0 to N - 1; default: the suite's.")] = None,
    epochs: Annotated[
        int | None, Option(help="Another number of epochs; the schedule keeps its shape.")
    ] = None,
    match_cost: Annotated[
        str | None, Option(help="Method whose training FLOPs decide each run's number of epochs.")
    ] = None,
    precision: Annotated[
        Precision | None, Option(help="Another precision than the suite's.")
    ] = None,
    data_dir: DataDir = None,
    compile_: Annotated[
        Compile, Option("--compile", help="How steps run; auto: what repays itself.")
    ] = Compile.auto,
    jobs: Annotated[
        int, Option(help="Runs at a time, as processes of their own; rates are then no measure.")
    ] = 1,
    num_processes: Annotated[
        int | None, Option(help="Processes that train each run together, one per GPU.")
    ] = None,
    workers: Workers = None,
    deterministic: Annotated[
        bool, Option("--deterministic", help="The same numbers each time on a GPU too; slower.")
    ] = False,
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
    cluster: cluster_options.ClusterOption = None,
    partition: cluster_options.Partition = None,
    gpus: cluster_options.Gpus = None,
    cpus: cluster_options.Cpus = None,
    time: cluster_options.Time = None,
    memory: cluster_options.Memory = None,
    constraint: cluster_options.Constraint = None,
    max_parallel: cluster_options.Parallel = None,
) -> None:
    """Train methods under a suite's schedule, then print the leaderboard."""
    from kdbench.suite.load import load_suite

    if not Place.of_this_process().launched:  # such processes meet first, and then end together
        load_suite(suite)
        check_method_names([*names_of(methods), *([match_cost] if match_cost else [])])
    from kdbench.data import is_cached, locate
    from kdbench.launch.execution import Execution, check_processes
    from kdbench.launch.local import execute
    from kdbench.launch.plan import agree, check_nothing_in_the_way, make_plan
    from kdbench.launch.ranks import together

    code = 0
    with together(num_processes, print_error) as ranks, silent(not ranks.is_main):
        how = Execution(
            results_dir,
            runs_dir,
            data_dir,
            compile_.value,
            overwrite=overwrite,
            tensorboard=tensorboard,
            deterministic=deterministic,
            jobs=jobs,
            processes=ranks.count if num_processes is None else num_processes,
            workers=workers,
        )
        asked = cluster_options.request(
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
        if epochs is not None and match_cost is not None:
            raise UserError("--match-cost decides the number of epochs; leave out --epochs.")
        if epochs is not None:
            chosen = chosen.with_epochs(epochs)
        if precision is not None:
            chosen = chosen.with_precision(precision.value)
        check_processes(chosen, how.processes, ranks)
        broken: list[UserError] = []

        def on_broken(error: UserError) -> None:
            broken.append(error)
            print_error(str(error))

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
            match_cost,
        )
        if not dry_run:
            check_nothing_in_the_way(plan)
        plan = agree(plan, ranks)
        diverged = [run for run in plan if run.state == "diverged"]
        if dry_run and plan:
            from kdbench.launch.preview import preview

            source = locate(chosen.data, data_dir, is_cached)
            if ranks.is_main:
                print(preview(plan, source, how))
            if cluster is not None:
                print(cluster_options.preview(plan, cluster, asked))
            if ranks.is_main:  # the others wait for it to be done
                check_nothing_in_the_way(plan)
        elif plan and cluster is not None:
            cluster_options.submit(plan, how, cluster, asked)
            _complain_of_diverged(diverged)
            code = 1 if broken or diverged else 0
        elif plan:
            new = execute(plan, how, ranks)
            _complain_of_diverged(diverged)
            code = 1 if _complain_of_unfinished(new) or broken or diverged else 0
            if ranks.is_main:
                # Where the disk took no result, there is no table, and it is said why.
                with contextlib.suppress(UserError) if code else contextlib.nullcontext():
                    suites = list(dict.fromkeys(run.spec.suite.name for run in plan))
                    print_report(
                        results_dir,
                        suites,
                        ReportFormat.terminal,
                        "baseline",
                        with_controls=match_cost is not None,
                    )
        else:
            code = 2
    if code:
        raise typer.Exit(code)


def _complain_of_diverged(before: "list[PlannedRun]") -> None:
    """Of runs that diverged in an earlier command: they would again."""
    if before:
        named = ", ".join(f"{run.spec.label} ({run.reason})" for run in before)
        print_error(f"Diverged before: {named}; --overwrite trains all that is asked for again.")


def _complain_of_unfinished(results: "list[Result]") -> bool:
    """Whether there are any."""
    unfinished = [result for result in results if result.status != "finished"]
    for result in unfinished:
        identity = result.identity
        name = f"{identity.method} {identity.architecture} seed {identity.seed}"
        print_error(f"{name} {result.status}: {result.reason}.")
    return bool(unfinished)
