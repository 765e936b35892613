"""Runs sent to where they wait for their turn, and what is written down about them.

runs/submitted/<name>/: submission.json, the order of each run, and the logs of whoever runs them.
"""

import fcntl
import itertools
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Literal

from pydantic import ValidationError

from kdbench.atomic import written_whole
from kdbench.engine.checkpoint import has_checkpoint, remove_checkpoint
from kdbench.engine.spec import RunSpec
from kdbench.launch.execution import Execution, run_folder
from kdbench.launch.order import WorkOrder
from kdbench.launch.status import RunStatus, Ticket, read_status, write_status
from kdbench.store import Record

FOLDER = "submitted"
FILE = "submission.json"


class Submission(Record):
    """What is known of one after it was sent."""

    cluster: Literal["slurm", "local"]
    job: str = ""
    """Slurm's number."""
    runs: int = 0

    def job_of(self, task: int) -> str:
        """Slurm's name of a run's job: submitit sends one alone as no array."""
        return f"{self.job}_{task}" if self.runs > 1 else self.job


def prepare(specs: Sequence[RunSpec], how: Execution) -> Path:
    """A folder for a new submission, with the orders of its runs.

    Raises:
        UserError: it cannot be written.
    """
    place = how.runs / FOLDER
    now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    names = itertools.chain([now], (f"{now}-{number}" for number in itertools.count(2)))
    folder = next(place / name for name in names if not (place / name).exists())
    if how.overwrite:  # now, not each time that a run's turn comes
        for spec in specs:
            remove_checkpoint(run_folder(how.runs, spec))
        how = replace(how, overwrite=False)
    for task, spec in enumerate(specs):
        order = WorkOrder.of(spec, how)
        order = order.model_copy(update={"ticket": Ticket(submission=folder.name, task=task)})
        with written_whole(order_file(folder, task)) as stream:
            stream.write(order.model_dump_json(indent=1).encode())
    return folder


def record(folder: Path, submission: Submission) -> None:
    """Write down that the runs were sent, and put them in the queue where they have not begun.

    Raises:
        UserError: a folder cannot be written.
    """
    with written_whole(folder / FILE) as stream:
        stream.write(submission.model_dump_json(indent=1).encode())
    for order in read_orders(folder):
        before = read_status(order.folder)
        if before is None or before.ticket != order.ticket:
            write_status(order.folder, _queued(order, before))


def _queued(order: WorkOrder, before: RunStatus | None) -> RunStatus:
    """It goes on from where an earlier process left it."""
    now = datetime.now(UTC)
    suite = order.suite
    fresh = RunStatus(
        state="queued",
        epochs=suite.schedule.epochs,
        steps=suite.total_steps,
        ticket=order.ticket,
        started=now,
        updated=now,
    )
    if before is None or not has_checkpoint(order.folder):
        return fresh
    kept = {"epoch", "step", "loss", "top1"}
    return fresh.model_copy(update=before.model_dump(include=kept))


def read_submission(folder: Path) -> Submission | None:
    """None where there is none that can be read."""
    try:
        return Submission.model_validate_json((folder / FILE).read_bytes())
    except (OSError, ValidationError):
        return None


def read_orders(folder: Path) -> list[WorkOrder]:
    """By task."""
    count = len(list(folder.glob("order-*.json")))
    return [read_order(order_file(folder, task)) for task in range(count)]


def read_order(file: Path) -> WorkOrder:
    return WorkOrder.model_validate_json(file.read_bytes())


def order_file(folder: Path, task: int) -> Path:
    return folder / f"order-{task}.json"


def cancel_file(folder: Path, task: int) -> Path:
    """Where it exists, the run is not wanted any more."""
    return folder / f"cancel-{task}"


def is_cancelled(order: WorkOrder, folder: Path) -> bool:
    """Whether the user wants it no more."""
    return order.ticket is not None and cancel_file(folder, order.ticket.task).exists()


def has_supervisor(folder: Path) -> bool:
    """Whether one lives, on whatever machine shares the file system and its locks."""
    lock = locked(folder)
    if lock is not None:
        lock.close()
    return lock is None


def locked(folder: Path) -> IO[bytes] | None:
    """The supervisor's lock, which ends with it; None where one lives and holds it."""
    lock = (folder / "lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock
