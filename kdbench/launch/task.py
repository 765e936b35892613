"""A run as a task of a Slurm array: what submitit calls on the node.

submitit heeds signals only once this is imported, so what takes long to import comes later.
"""

import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from submitit.core.utils import DelayedSubmission, UncompletedJobError

if TYPE_CHECKING:
    from kdbench.engine.stop import Stop
    from kdbench.launch.order import WorkOrder

REQUEUE = (signal.SIGUSR1, signal.SIGUSR2)
"""What Slurm sends for submitit where a job is to go back to the queue."""

NO_RESULT = 128 + signal.SIGTERM


class Task:
    """Carries out an order; pre-empted or out of time, it goes back to the queue."""

    def __init__(self, order: Path):
        self.order = order

    def __call__(self) -> None:
        from kdbench.engine.stop import Stop
        from kdbench.errors import UserError
        from kdbench.launch.dispatch import read_order
        from kdbench.launch.worker import work
        from kdbench.signals import SIGNALS

        order = read_order(self.order)
        stop = Stop()
        try:
            with stop.on(*SIGNALS):
                work(order, stop)
        except UserError as error:
            print(f"kdbench: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            self._end(order, stop)

    def checkpoint(self) -> DelayedSubmission:
        """What submitit puts back into the queue: the run finds its checkpoint by itself."""
        return DelayedSubmission(self)

    def _end(self, order: "WorkOrder", stop: "Stop") -> None:
        """The checkpoint is written; where the job shall come again, submitit's handler sees to it.

        After SIGTERM alone Slurm knows whether it comes again: it is pre-empted, or cancelled.
        """
        from kdbench.launch.dispatch import is_cancelled
        from kdbench.launch.status import leave_word

        asked = [n for n in stop.received if n in REQUEUE and callable(signal.getsignal(n))]
        if is_cancelled(order, self.order.parent):
            leave_word(order.folder, "stopped", "cancelled")
        elif not asked:
            leave_word(order.folder, "stopped", f"told to by {stop.received[-1].name}")
        else:
            leave_word(order.folder, "queued", "goes on when its turn comes again")
            try:
                signal.raise_signal(asked[0])
            except UncompletedJobError:
                leave_word(order.folder, "stopped", "out of time as often as it may be")
            except (subprocess.SubprocessError, OSError) as error:
                leave_word(order.folder, "stopped", f"could not be sent again: {error}")
        sys.exit(NO_RESULT)
