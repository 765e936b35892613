"""Runs a plan in several processes at a time, each run in one of its own."""

import os
import time
from collections import deque
from collections.abc import Generator

import torch

from kdbench.data import Source, open_images
from kdbench.launch.child import Child, end_all, interrupted_by_signals
from kdbench.launch.display import Display
from kdbench.launch.execution import Execution
from kdbench.launch.order import WorkOrder
from kdbench.launch.plan import PlannedRun
from kdbench.launch.shares import Shares
from kdbench.store import Result

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
    shares = Shares.among(jobs, how.processes)
    waiting = deque(todo)
    running: dict[int, Followed] = {}
    with interrupted_by_signals():
        try:
            while waiting or running:
                for slot in set(range(jobs)) - set(running):
                    if waiting:
                        running[slot] = Followed(waiting.popleft(), how, shares, slot, display)
                time.sleep(POLL_SECONDS)
                for slot, run in list(running.items()):
                    result = run.poll()
                    if result is not None:
                        del running[slot]
                        yield result
        finally:
            end_all([run.child for run in running.values()])


class Followed:
    """A run in a process of its own, and its line on the display."""

    def __init__(
        self, run: PlannedRun, how: Execution, shares: Shares, slot: int, display: Display
    ):
        order = WorkOrder.of(run.spec, how, shares.on_a_device, parent=os.getpid())
        self.child = Child(order, shares, slot)
        self.line = display.start(run.spec)

    def poll(self) -> Result | None:
        """Show how far the run is; its result once the process has ended.

        Raises:
            UserError: the process met one.
        """
        ended = self.child.ended
        status = self.child.status()
        if status is not None:
            self.line.show(status)
        if not ended:
            return None
        result = self.child.outcome()
        self.line.finish(result)
        return result
