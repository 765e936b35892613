"""Carries out a submission on this machine: `python -m kdbench.launch.supervisor FOLDER PARALLEL`.

It outlives the command and the terminal that started it. Its end ends its runs.
"""

import os
import sys
import time
from collections import deque
from dataclasses import replace
from functools import partial
from pathlib import Path

from kdbench.errors import UserError
from kdbench.launch.child import Child, end_all, interrupted_by_signals
from kdbench.launch.dispatch import is_cancelled, read_orders
from kdbench.launch.mps import side_by_side
from kdbench.launch.order import WorkOrder
from kdbench.launch.shares import Shares
from kdbench.launch.status import leave_word, read_status

POLL_SECONDS = 0.2


def supervise(folder: Path, parallel: int) -> None:
    """Run the orders of a submission, some at a time; one that fails ends no other.

    Raises:
        KeyboardInterrupt: it was told to stop; every run then has its checkpoint.
    """
    waiting = deque(read_orders(folder))
    equal = Shares.among(min(parallel, len(waiting)))
    try:
        with side_by_side(equal, partial(print, flush=True)) as shares:
            _carry_out(waiting, folder, shares)
    finally:
        for order in waiting:
            leave_word(order.folder, "stopped", "its supervisor was told to stop")


def _carry_out(waiting: deque[WorkOrder], folder: Path, shares: Shares) -> None:
    running: dict[int, Child] = {}
    try:
        while waiting or running:
            for slot in set(range(shares.jobs)) - set(running):
                if waiting and (child := _start(waiting.popleft(), folder, shares, slot)):
                    running[slot] = child
            time.sleep(POLL_SECONDS)
            for slot, child in list(running.items()):
                if _is_over(child, folder):
                    del running[slot]
    finally:
        end_all(list(running.values()))


def _start(order: WorkOrder, folder: Path, shares: Shares, slot: int) -> Child | None:
    """None where there is nothing to run: the user wants it no more, or has to mend something."""
    if is_cancelled(order, folder):
        leave_word(order.folder, "stopped", "cancelled")
        return None
    how = replace(order.how, jobs=shares.jobs)  # they share the cores, also to decode
    changes = {"parent": os.getpid(), "jobs": shares.on_a_device, "how": how}
    try:
        return Child(order.model_copy(update=changes), shares, slot)
    except UserError as error:
        leave_word(order.folder, "failed", str(error))
        return None


def _is_over(child: Child, folder: Path) -> bool:
    cancelled = is_cancelled(child.order, folder)
    if not child.ended:
        if cancelled:
            child.ask_to_stop()
        return False
    status = read_status(child.order.folder)
    if status is not None and status.state == "stopped":
        leave_word(child.order.folder, "stopped", "cancelled" if cancelled else None)
        return True
    try:
        child.outcome()
    except UserError as error:
        leave_word(child.order.folder, "failed", str(error))
    return True


def main() -> None:
    """Supervise the submission that is named."""
    folder, parallel = Path(sys.argv[1]), int(sys.argv[2])
    with interrupted_by_signals():
        supervise(folder, parallel)


if __name__ == "__main__":
    main()
