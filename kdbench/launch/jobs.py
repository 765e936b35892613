"""Runs a plan in several processes at a time, each run in one of its own."""

import os
import time
from collections import deque
from collections.abc import Generator
from pathlib import Path

import torch

from kdbench.data import Source, open_images
from kdbench.engine.run_files import unwritable_folder_warning
from kdbench.errors import UnwritableError
from kdbench.launch.child import Child, end_all, interrupted_by_signals
from kdbench.launch.claim import WAITING, TakenError, is_claimed
from kdbench.launch.death import record_unwritable
from kdbench.launch.display import Display
from kdbench.launch.execution import Execution, run_folder
from kdbench.launch.mps import side_by_side
from kdbench.launch.order import WorkOrder
from kdbench.launch.plan import PlannedRun
from kdbench.launch.shares import Shares
from kdbench.results.files import check_writable
from kdbench.results.schema import Result

POLL_SECONDS = 0.2


def run_in_processes(
    todo: list[PlannedRun], jobs: int, source: Source, how: Execution, display: Display
) -> Generator[Result]:
    """The result of each run, when it exists; no process is left when this ends.

    Raises:
        UserError: one that a process met, or this one for it.
        KeyboardInterrupt: the user stopped it, or SIGTERM did.
    """
    with display.note(source.reading()):
        # The processes then find them in the cache.
        open_images(source, torch.device("cpu"), workers=0)
    waiting = deque(todo)
    running: dict[int, Followed] = {}
    equal = Shares.among(jobs, how.processes)
    with interrupted_by_signals(), side_by_side(equal, display.say) as shares:
        try:
            while waiting or running:
                for slot in set(range(jobs)) - set(running):
                    run = _first_free(waiting, how.runs)
                    if run is None:
                        continue
                    try:
                        running[slot] = Followed(run, how, shares, slot, display)
                    except UnwritableError as error:
                        yield record_unwritable(run.spec, how, error)
                if waiting and not running:
                    display.say(WAITING)
                time.sleep(POLL_SECONDS)
                for slot, followed in list(running.items()):
                    try:
                        result = followed.poll()
                    except TakenError:  # by another command, a moment before its process began
                        waiting.append(running.pop(slot).run)
                        continue
                    if result is not None:
                        del running[slot]
                        yield result
        finally:
            end_all([followed.child for followed in running.values()])


def _first_free(waiting: deque[PlannedRun], runs: Path) -> PlannedRun | None:
    """Taken out of those that wait; None where other commands have them all."""
    for run in waiting:
        if not is_claimed(run_folder(runs, run.spec)):
            waiting.remove(run)
            return run
    return None


class Followed:
    """A run in a process of its own, and its line on the display."""

    def __init__(
        self, run: PlannedRun, how: Execution, shares: Shares, slot: int, display: Display
    ):
        self.run = run
        order = WorkOrder.of(run.spec, how, shares.on_a_device, parent=os.getpid())
        self.child = Child(order, shares, slot)
        self.line = display.start(run.spec)

    def poll(self) -> Result | None:
        """Show how far the run is; its result once the process has ended.

        Raises:
            TakenError: another command has the run.
            UserError: the process met one.
        """
        ended = self.child.ended
        status = self.child.status()
        if status is not None:
            self.line.show(status)
        if not ended:
            return None
        try:
            result = self.child.outcome()
        except TakenError:
            self.line.leave()
            raise
        self.line.finish(result)
        try:
            check_writable(self.child.order.folder)
        except UnwritableError as error:  # its status, in which it said so, was lost too
            self.line.on_message(unwritable_folder_warning(self.child.order.folder, error))
        return result
