"""Options of `kdbench run` for clusters, and the `kdbench status` and `kdbench cancel` commands."""

import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from kdbench.cli.common import RUNS, RunsDir, split_names
from kdbench.errors import UserError, pluralize
from kdbench.launch.place import Place

if TYPE_CHECKING:
    from kdbench.launch.execution import Execution
    from kdbench.launch.plan import PlannedRun
    from kdbench.launch.slurm import SlurmRequest
    from kdbench.launch.watch import Watched

REFRESH_SECONDS = 5.0
"""Interval of `kdbench status --watch`."""


class Cluster(StrEnum):
    """Destination of runs that are submitted."""

    slurm = "slurm"
    local = "local"


ClusterOption = Annotated[
    Cluster | None, Option(help="Submit the runs and return; `kdbench status` follows them.")
]
Partition = Annotated[
    str | None, Option(help="Slurm partition. Default: the cluster's default partition.")
]
Gpus = Annotated[int | None, Option(help="Slurm: GPUs per run, 0 or 1.")]
Cpus = Annotated[int | None, Option(help="Slurm: CPU cores per run. Default: 1.")]
Time = Annotated[
    str | None,
    Option(
        help="Slurm: time limit per job; a run continues in the next job. Default: the maximum."
    ),
]
Memory = Annotated[str | None, Option("--mem", help="Slurm: memory per run, such as 16G.")]
Constraint = Annotated[str | None, Option(help="Slurm: required features of the nodes.")]
Parallel = Annotated[
    int | None,
    Option("--max-parallel", help="Maximum number of concurrent runs. Default: all; 1 if local."),
]
Names = Annotated[str, Option(help="Comma-separated list. Default: all.")]


def make_request(cluster: Cluster | None, config: "Execution", **options: object) -> "SlurmRequest":
    """Return the resources requested from the cluster.

    Raises:
        UserError: An option does not apply.
    """
    from kdbench.launch.slurm import SlurmRequest

    given = {name: value for name, value in options.items() if value is not None}
    flags = {"parallel": "--max-parallel", "memory": "--mem"}
    for name in given:
        flag = flags.get(name, f"--{name}")
        if cluster is None:
            raise UserError(f"{flag} needs --cluster.")
        if cluster is Cluster.local and name != "parallel":
            raise UserError(f"{flag} needs --cluster slurm; --cluster local takes --max-parallel.")
    if cluster is not None and config.jobs != 1:
        raise UserError("--jobs cannot be combined with --cluster; use --max-parallel.")
    if cluster is not None and Place.of_this_process().launched:
        raise UserError("--cluster cannot be used under a launcher; start the command directly.")
    if cluster is not None and config.processes != 1:
        raise UserError(
            "--cluster supports one process per run; for several processes, start torchrun in "
            "your own job."
        )
    return SlurmRequest(**given)  # type: ignore[arg-type]


def preview(plan: "list[PlannedRun]", cluster: Cluster, request: "SlurmRequest") -> str:
    """Return a description of what would be submitted, for `--dry-run`."""
    from kdbench.launch import slurm

    runs = sum(run.state == "to run" for run in plan)
    if cluster is Cluster.local:
        return f"In the background of this machine, {request.parallel or 1} at a time."
    parameters = request.sbatch(runs, slurm.check_partition(request.partition))
    listed = ", ".join(f"{name}={value}" for name, value in parameters.items())
    return f"A Slurm array of {pluralize(runs, 'job')}: {listed}."


def submit(
    plan: "list[PlannedRun]", config: "Execution", cluster: Cluster, request: "SlurmRequest"
) -> None:
    """Submit the runs of a plan, and print how to follow them."""
    from kdbench.launch.cluster import submit

    submission = submit(plan, config, cluster.value, request)
    if submission.under_way:
        print(f"{pluralize(submission.under_way, 'run')} already submitted.")
    if submission.folder is None:
        print("Nothing to submit.")
        return
    target = (
        f"to Slurm as job {submission.job}"
        if submission.job
        else "to the background of this machine"
    )
    print(f"Submitted {pluralize(submission.runs, 'run')} {target}; logs: {submission.folder}.")
    runs = "" if config.runs == RUNS else f" --runs-dir {config.runs}"
    results = "" if config.results == Path("results") else f" --results-dir {config.results}"
    print(f"Next: kdbench status{runs}    show the state of the runs")
    print(f"      kdbench report{results}    show the leaderboard so far")
    print(f"      kdbench cancel{runs}    cancel the runs")


def status(
    suite: Names = "",
    methods: Names = "",
    architectures: Names = "",
    watch: Annotated[bool, Option("--watch", help="Refresh until all runs have ended.")] = False,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Show the state of the runs: queued, running, finished, or failed and why."""
    from kdbench.launch.watch import table

    names = split_names(suite), split_names(methods), split_names(architectures)
    runs = _select_runs(runs_dir, *names)
    if watch:
        from rich.live import Live
        from rich.text import Text

        with Live(auto_refresh=False, transient=True) as live:
            while any(run.under_way for run in runs):
                live.update(Text(table(runs)), refresh=True)
                time.sleep(REFRESH_SECONDS)
                runs = _select_runs(runs_dir, *names)
    print(table(runs), end="")


def cancel(
    suite: Names = "",
    methods: Names = "",
    architectures: Names = "",
    runs_dir: RunsDir = RUNS,
) -> None:
    """Cancel submitted runs that have not ended. Checkpoints are kept."""
    from kdbench.launch.cancel import cancel

    names = split_names(suite), split_names(methods), split_names(architectures)
    cancelled = cancel(runs_dir, _select_runs(runs_dir, *names))
    print(
        f"Cancelled {pluralize(len(cancelled), 'run')}; submit again with the same command to "
        "continue."
    )


def _select_runs(runs: Path, *names: list[str]) -> "list[Watched]":
    from kdbench.launch.watch import chosen, watch

    watched = watch(runs)
    if not watched:
        raise UserError(f"No run has a status in '{runs}'; name another folder with --runs-dir.")
    return chosen(watched, *names)
