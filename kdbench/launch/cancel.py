"""Takes runs back that were sent to where they wait for their turn."""

from collections.abc import Sequence
from pathlib import Path

from kdbench.launch import slurm
from kdbench.launch.status import change_status
from kdbench.launch.submission import FOLDER, cancel_file
from kdbench.launch.watch import Places, Watched, tickets


def cancel(runs: Path, watched: Sequence[Watched]) -> list[Watched]:
    """Take runs back that were submitted and are not over; those that were.

    What a run did so far is kept: the same command goes on from its checkpoint.

    Raises:
        UserError: Slurm does not cancel them, or a folder cannot be written.
    """
    places = Places(runs)
    taken: list[Watched] = []
    jobs: list[str] = []
    for run, ticket in tickets(watched):
        submission = places.submission(ticket)
        if submission is None:
            continue
        cancel_file(runs / FOLDER / ticket.submission, ticket.task).touch()
        if submission.cluster == "slurm":
            jobs.append(submission.job_of(ticket.task))
        taken.append(run)
    if jobs:
        slurm.cancel(jobs)
    for run in taken:
        if run.state == "queued":
            change_status(run.folder, "stopped", "cancelled")
    return taken
