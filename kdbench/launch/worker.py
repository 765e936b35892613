"""One run in a process of its own: `python -m kdbench.launch.worker`, a work order on its input.

Whoever started it learns from the run's files how it goes: its status, its result. It ends with
code 0 where the result is written, and with 2 and one sentence where the user can put things right.
"""

import os
import signal
import sys
import threading
import time

from kdbench.data import is_cached, locate
from kdbench.engine.device import make_accelerator
from kdbench.engine.mode import step_mode
from kdbench.engine.stop import Stop
from kdbench.errors import UserError
from kdbench.launch.execution import read_images, run_and_save
from kdbench.launch.order import WorkOrder
from kdbench.launch.status import StatusReporter, change_status
from kdbench.signals import SIGNALS
from kdbench.store import Result

WATCH_SECONDS = 1.0
GRACE_SECONDS = 60.0
"""For the last step and its checkpoint once the process that watched over the run is gone."""


def work(order: WorkOrder, stop: Stop) -> Result:
    """Carry out an order; the result is written and returned.

    The run's status says how it ended, unless by an error that is no fault of the user.

    Raises:
        UserError: data that cannot be read, a folder that cannot be written, a changed method.
        KeyboardInterrupt: it was stopped.
    """
    try:
        spec = order.spec()
    except UserError as error:
        change_status(order.folder, "failed", str(error))
        raise
    how = order.how
    with StatusReporter(order.folder, spec, order.ticket) as reporter:
        accelerator = make_accelerator(how.runs, how.tensorboard)
        place = accelerator.device, accelerator.num_processes
        mode = step_mode(how.compile, spec.suite, spec.architecture, *place)
        source = locate(spec.suite.data, how.data_dir, is_cached)
        images = read_images(source, accelerator.device)
        result = run_and_save(spec, images, how, accelerator, reporter, mode, order.jobs, stop)
        reporter.end(result.status, result.reason)
    return result


def main() -> None:
    """Carry out the order on standard input."""
    stop = Stop()
    with stop.on(*SIGNALS):
        order = WorkOrder.model_validate_json(sys.stdin.buffer.read())
        if order.parent is not None:
            threading.Thread(target=_stop_after, args=(order.parent,), daemon=True).start()
        try:
            work(order, stop)
        except UserError as error:
            print(f"kdbench: {error}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)


def _stop_after(parent: int) -> None:
    """Stop this process once the one that started it is gone; its killer may leave it no time."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
