"""Commands and options for runs that wait for their turn elsewhere."""

import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Option

from kdbench.cli.common import RUNS, RunsDir, names_of
from kdbench.errors import UserError, pluralize
from kdbench.launch.place import Place

if TYPE_CHECKING:
    from kdbench.launch.execution import Execution
    from kdbench.launch.plan import PlannedRun
    from kdbench.launch.slurm import SlurmRequest
    from kdbench.launch.watch import Watched

REFRESH_SECONDS = 5.0


class Cluster(StrEnum):
    """Where runs are sent."""

    slurm = "slurm"
    local = "local"


ClusterOption = Annotated[
    Cluster | None, Option(help="Send the runs there and return; `kdbench status` follows them.")
]
Partition = Annotated[str | None, Option(help="Slurm: default: the cluster's.")]
Gpus = Annotated[int | None, Option(help="Slurm: GPUs a run, 0 or 1.")]
Cpus = Annotated[int | None, Option(help="Slurm: cores a run; default: 1.")]
Time = Annotated[
    str | None, Option(help="Slurm: time a job; a run goes on in the next. Default: all there is.")
]
Memory = Annotated[str | None, Option("--mem", help="Slurm: memory a run, as 16G.")]
Constraint = Annotated[str | None, Option(help="Slurm: features of the nodes.")]
Parallel = Annotated[
    int | None, Option("--max-parallel", help="Runs at a time; default: all, on this machine 1.")
]
Names = Annotated[str, Option(help="Comma list; default: all.")]


def request(cluster: Cluster | None, how: "Execution", **options: object) -> "SlurmRequest":
    """What is asked of the cluster.

    Raises:
        UserError: an option that has no meaning there.
    """
    from kdbench.launch.slurm import SlurmRequest

    given = {name: value for name, value in options.items() if value is not None}
    flags = {"parallel": "--max-parallel", "memory": "--mem"}
    for name in given:
        flag = flags.get(name, f"--{name}")
        if cluster is None:
            raise UserError(f"{flag} needs --cluster.")
        if cluster is Cluster.local and name != "parallel":
            raise UserError(f"{flag} is for --cluster slurm; --cluster local has --max-parallel.")
    if cluster is not None and how.jobs != 1:
        raise UserError("--jobs and --cluster exclude each other; use --max-parallel.")
    if cluster is not None and Place.of_this_process().launched:
        raise UserError("--cluster sends runs by itself; start it without a launcher.")
    if cluster is not None and how.processes != 1:
        raise UserError(
            "--cluster sends runs that one process trains; for several, start torchrun in a job "
            "of your own."
        )
    return SlurmRequest(**given)  # type: ignore[arg-type]


def preview(plan: "list[PlannedRun]", cluster: Cluster, asked: "SlurmRequest") -> str:
    """What would be sent, and with which parameters."""
    from kdbench.launch import slurm

    runs = sum(run.state == "to run" for run in plan)
    if cluster is Cluster.local:
        return f"In the background of this machine, {asked.parallel or 1} at a time."
    parameters = asked.sbatch(runs, slurm.check_partition(asked.partition))
    listed = ", ".join(f"{name}={value}" for name, value in parameters.items())
    return f"An array of {pluralize(runs, 'job')} of Slurm: {listed}."


def submit(
    plan: "list[PlannedRun]", how: "Execution", cluster: Cluster, asked: "SlurmRequest"
) -> None:
    """Send the runs of a plan, and say how to follow them."""
    from kdbench.launch.cluster import submit

    sent = submit(plan, how, cluster.value, asked)
    if sent.under_way:
        print(f"{pluralize(sent.under_way, 'run')} under way already: not sent again.")
    if sent.folder is None:
        print("Nothing to send.")
        return
    where = f"to Slurm as job {sent.job}" if sent.job else "to the background of this machine"
    print(f"Sent {pluralize(sent.runs, 'run')} {where}; logs: {sent.folder}.")
    runs = "" if how.runs == RUNS else f" --runs-dir {how.runs}"
    results = "" if how.results == Path("results") else f" --results-dir {how.results}"
    print(f"Next: kdbench status{runs}    how they are")
    print(f"      kdbench report{results}    the leaderboard so far")
    print(f"      kdbench cancel{runs}    take them back")


def status(
    suite: Names = "",
    methods: Names = "",
    architectures: Names = "",
    watch: Annotated[bool, Option("--watch", help="Follow them until all are over.")] = False,
    runs_dir: RunsDir = RUNS,
) -> None:
    """Print how the runs are: queued, running, finished, failed and why."""
    from kdbench.launch.watch import table

    names = names_of(suite), names_of(methods), names_of(architectures)
    found = _chosen(runs_dir, *names)
    if watch:
        from rich.live import Live
        from rich.text import Text

        with Live(auto_refresh=False, transient=True) as live:
            while any(run.under_way for run in found):
                live.update(Text(table(found)), refresh=True)
                time.sleep(REFRESH_SECONDS)
                found = _chosen(runs_dir, *names)
    print(table(found), end="")


def cancel(
    suite: Names = "",
    methods: Names = "",
    architectures: Names = "",
    runs_dir: RunsDir = RUNS,
) -> None:
    """Take back runs that were sent to a cluster and are not over; checkpoints are kept."""
    from kdbench.launch.cancel import cancel

    found = _chosen(runs_dir, names_of(suite), names_of(methods), names_of(architectures))
    taken = cancel(runs_dir, found)
    print(
        f"Cancelled {pluralize(len(taken), 'run')}; the command that sent them sends what is left."
    )


def _chosen(runs: Path, *names: list[str]) -> "list[Watched]":
    from kdbench.launch.watch import chosen, watch

    watched = watch(runs)
    if not watched:
        raise UserError(f"No run has a status in '{runs}'; --runs-dir names another folder.")
    return chosen(watched, *names)
