"""The orders of a submission: written before it is sent, read by whoever carries them out."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from kdbench.atomic import atomic_write, exists, os_errors_as_user_errors
from kdbench.engine.checkpoint import has_checkpoint, remove_checkpoints
from kdbench.engine.spec import RunSpec
from kdbench.launch.execution import Execution
from kdbench.launch.order import WorkOrder
from kdbench.launch.status import RunStatus, Ticket, read_status, write_status
from kdbench.launch.submission import (
    FILE,
    FOLDER,
    Submission,
    begun_file,
    cancel_file,
    order_file,
)


def prepare(specs: Sequence[RunSpec], how: Execution) -> Path:
    """A folder for a new submission, with the orders of its runs.

    Raises:
        UserError: it cannot be written.
    """
    place = how.runs / FOLDER
    now = datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
    names = itertools.chain([now], (f"{now}-{number}" for number in itertools.count(2)))
    folder = next(folder for name in names if _made(folder := place / name))
    for task, spec in enumerate(specs):
        order = WorkOrder.of(spec, how)
        order = order.model_copy(update={"ticket": Ticket(submission=folder.name, task=task)})
        with atomic_write(order_file(folder, task)) as stream:
            stream.write(order.model_dump_json(indent=1).encode())
    return folder


def _made(folder: Path) -> bool:
    """Whether it is this command's: another may send runs in the same second."""
    with os_errors_as_user_errors(f"write to '{folder}'"):
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            return False
    return True


def at_its_turn(order: WorkOrder) -> Execution:
    """How to carry out an order: of a run to begin anew nothing is kept when its turn comes first,
    and when it comes again what it did then.

    Raises:
        UnwritableError: its folder, or that of its submission, cannot be written.
    """
    if order.ticket is None or not order.how.overwrite:
        return order.how
    begun = begun_file(order.how.runs / FOLDER / order.ticket.submission, order.ticket.task)
    if not exists(begun):
        remove_checkpoints(order.folder)
        with os_errors_as_user_errors(f"write '{begun}'"):
            begun.touch()
    return replace(order.how, overwrite=False)


def record(folder: Path, submission: Submission) -> None:
    """Write down that the runs were sent, and put them in the queue where they have not begun.

    Raises:
        UserError: a folder cannot be written.
    """
    with atomic_write(folder / FILE) as stream:
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
    if before is None or order.how.overwrite or not has_checkpoint(order.folder):
        return fresh
    kept = {"epoch", "step", "loss", "top1"}
    return fresh.model_copy(update=before.model_dump(include=kept))


def read_orders(folder: Path) -> list[WorkOrder]:
    """By task."""
    count = len(list(folder.glob("order-*.json")))
    return [read_order(order_file(folder, task)) for task in range(count)]


def read_order(file: Path) -> WorkOrder:
    return WorkOrder.model_validate_json(file.read_bytes())


def is_cancelled(order: WorkOrder, folder: Path) -> bool:
    """Whether the user wants it no more."""
    return order.ticket is not None and cancel_file(folder, order.ticket.task).exists()
