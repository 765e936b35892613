"""The `kdbench run` command. Slow imports happen inside the command."""

import contextlib
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
    RunsDir,
    SuiteName,
    Workers,
    print_error,
    split_names,
)
from kdbench.cli.report import ReportFormat, print_report
from kdbench.errors import UserError
from kdbench.launch.place import Place, silent
from kdbench.method_names import check_method_names

if TYPE_CHECKING:
    from kdbench.launch.execution import Execution
    from kdbench.launch.plan import PlannedRun
    from kdbench.launch.ranks import Ranks
    from kdbench.launch.slurm import SlurmRequest
    from kdbench.results.schema import Result
    from kdbench.suite.suite import Suite


def run(
    suite: SuiteName = "digits",
    methods: Methods = "all",
    architectures: Annotated[
        str,
        Option(help="Comma-separated list; A+B is a mixed cohort with the student last."),
    ] = "",
    seeds: Annotated[
        int | None, Option(help="Number of seeds. Default: the suite's number.")
    ] = None,
    epochs: Annotated[
        int | None, Option(help="Number of epochs; the schedule keeps its shape.")
    ] = None,
    match_cost: Annotated[
        str | None,
        Option(help="Method whose training FLOPs determine the number of epochs of each run."),
    ] = None,
    precision: Annotated[
        Precision | None, Option(help="Precision. Default: the suite's precision.")
    ] = None,
    data_dir: DataDir = None,
    compile_: Annotated[
        Compile, Option("--compile", help="Way of running steps; 'auto' takes the fastest overall.")
    ] = Compile.auto,
    jobs: Annotated[
        int, Option(help="Number of concurrent runs; throughput is then not comparable.")
    ] = 1,
    num_processes: Annotated[
        int | None, Option(help="Number of processes that train each run together, one per GPU.")
    ] = None,
    workers: Workers = None,
    deterministic: Annotated[
        bool, Option("--deterministic", help="Use deterministic kernels on a GPU; slower.")
    ] = False,
    set_: Annotated[
        list[str] | None,
        Option("--set", help="Method option as METHOD.OPTION=VALUE; may be repeated."),
    ] = None,
    results_dir: ResultsDir = RESULTS,
    runs_dir: RunsDir = RUNS,
    overwrite: Annotated[
        bool, Option("--overwrite", help="Train all runs again, even those that have a result.")
    ] = False,
    overwrite_stale: Annotated[
        bool,
        Option("--overwrite-stale", help="Train runs again whose result has another version."),
    ] = False,
    tensorboard: Annotated[
        bool, Option(help="Also log to TensorBoard, in the runs folder.")
    ] = False,
    dry_run: Annotated[bool, Option(help="Only print the plan and its estimated time.")] = False,
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

    if not Place.of_this_process().launched:  # launched processes must meet first, to end together
        load_suite(suite)
        check_method_names([*split_names(methods), *([match_cost] if match_cost else [])])
    from kdbench.engine.device import emulates_bf16
    from kdbench.launch.execution import Execution, check_processes
    from kdbench.launch.plan import agree, check_nothing_in_the_way, make_plan
    from kdbench.launch.ranks import together

    with together(num_processes, print_error) as ranks, silent(not ranks.is_main):
        config = Execution(
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
        request = cluster_options.make_request(
            cluster,
            config,
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
            raise UserError("--match-cost sets the number of epochs; leave out --epochs.")
        if epochs is not None:
            chosen = chosen.with_epochs(epochs)
        if precision is not None:
            chosen = chosen.with_precision(precision.value)
        if chosen.precision == "bf16" and emulates_bf16():
            print_error(
                "This CPU has no instructions for bf16, so training takes about ten times as long "
                "as in fp32; leave out --precision bf16 or use another machine."
            )
        check_processes(chosen, config.processes, ranks)
        broken: list[UserError] = []

        def on_broken(error: UserError) -> None:
            broken.append(error)
            print_error(str(error))

        plan = make_plan(
            chosen,
            split_names(methods),
            split_names(architectures),
            seeds,
            set_ or [],
            results_dir,
            # Only the main process decides by existing results; the others follow its plan.
            "all" if overwrite or not ranks.is_main else "stale" if overwrite_stale else "nothing",
            on_broken,
            match_cost,
            lambda: _find_data_digest(chosen, config),
        )
        if not dry_run:
            check_nothing_in_the_way(plan)
        plan = agree(plan, ranks)
        if not plan:
            code = 2
        elif dry_run:
            _preview(plan, config, ranks, cluster, request)
            code = 0
        elif cluster is not None:
            cluster_options.submit(plan, config, cluster, request)
            code = 1 if _report_diverged(plan) or broken else 0
        else:
            code = _execute(plan, config, ranks, bool(broken), match_cost is not None)
    if code:
        raise typer.Exit(code)


def _find_data_digest(suite: "Suite", config: "Execution") -> str | None:
    """Return the hash of a suite's data; None if the data is not found."""
    import torch

    from kdbench.data import data_digest, is_cached, locate, open_images

    try:
        source = locate(suite.data, config.data_dir, is_cached)
    except UserError:  # existing results can be shown without data
        return None
    return data_digest(*open_images(source, torch.device("cpu"), workers=0))


def _preview(
    plan: "list[PlannedRun]",
    config: "Execution",
    ranks: "Ranks",
    cluster: cluster_options.Cluster | None,
    request: "SlurmRequest",
) -> None:
    """Print the plan for `--dry-run`."""
    from kdbench.data import is_cached, locate
    from kdbench.launch.plan import check_nothing_in_the_way
    from kdbench.launch.preview import preview

    source = locate(plan[0].spec.suite.data, config.data_dir, is_cached)
    if ranks.is_main:
        print(preview(plan, source, config))
    if cluster is not None:
        print(cluster_options.preview(plan, cluster, request))
    if ranks.is_main:  # the other processes wait for it
        check_nothing_in_the_way(plan)


def _execute(
    plan: "list[PlannedRun]",
    config: "Execution",
    ranks: "Ranks",
    broken: bool,
    with_controls: bool,
) -> int:
    """Train the runs of a plan and print the leaderboard; return the exit code."""
    from kdbench.launch.local import execute

    results = execute(plan, config, ranks)
    diverged = _report_diverged(plan)
    code = 1 if _report_unfinished(results) or broken or diverged else 0
    if ranks.is_main:
        # If no result could be written there is no table, and the reason was reported above.
        with contextlib.suppress(UserError) if code else contextlib.nullcontext():
            print_report(
                config.results,
                list(dict.fromkeys(run.spec.suite.name for run in plan)),
                ReportFormat.terminal,
                "baseline",
                with_controls=with_controls,
            )
    return code


def _report_diverged(plan: "list[PlannedRun]") -> bool:
    """Report runs that diverged in an earlier command and would diverge again."""
    diverged = [run for run in plan if run.state == "diverged"]
    if diverged:
        listed = ", ".join(f"{run.spec.label} ({run.reason})" for run in diverged)
        print_error(
            f"These runs diverged before and were not trained again: {listed}. Use --overwrite to "
            "train all runs of this command again."
        )
    return bool(diverged)


def _report_unfinished(results: "list[Result]") -> bool:
    """Report runs that failed or diverged; return True if there are any."""
    unfinished = [result for result in results if result.status != "finished"]
    for result in unfinished:
        identity = result.identity
        name = f"{identity.method} {identity.architecture} seed {identity.seed}"
        print_error(f"{name} {result.status}: {result.reason}.")
    return bool(unfinished)
