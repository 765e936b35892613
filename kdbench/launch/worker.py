"""One run in a process of its own: `python -m kdbench.launch.worker`, a work order on its input.

Whoever started it learns from the run's files how it goes: its status, its result. It ends with
code 0 where the result is written, and with 2 and one sentence where the user can put things right.
"""

import os
import signal
import sys
import threading
import time

from kdbench.data import is_cached, locate, open_images
from kdbench.engine.device import make_accelerator
from kdbench.engine.mode import step_mode
from kdbench.errors import UserError
from kdbench.launch.execution import run_and_save, run_folder
from kdbench.launch.order import WorkOrder
from kdbench.launch.status import State, StatusReporter
from kdbench.store import Result

WATCH_SECONDS = 1.0


def work(order: WorkOrder) -> Result:
    """Carry out an order; the result is written and returned.

    Raises:
        UserError: data that cannot be read, a folder that cannot be written, a changed method.
    """
    spec, how = order.spec(), order.how
    reporter = StatusReporter(run_folder(how.runs, spec), spec)
    state: State = "failed"
    try:
        accelerator = make_accelerator(how.runs, how.tensorboard)
        place = accelerator.device, accelerator.num_processes
        mode = step_mode(how.compile, spec.suite, spec.architecture, *place)
        source = locate(spec.suite.data, how.data_dir, is_cached)
        workers = how.decoding_processes(accelerator.num_processes)
        images = open_images(source, accelerator.device, workers)
        result = run_and_save(spec, images, how, accelerator, reporter, mode, order.jobs)
        state = result.status
        return result
    except KeyboardInterrupt:
        state = "stopped"
        raise
    finally:
        reporter.end(state)


def main() -> None:
    """Carry out the order on standard input."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that files are cleared away
    order = WorkOrder.model_validate_json(sys.stdin.buffer.read())
    if order.parent is not None:
        threading.Thread(target=_stop_after, args=(order.parent,), daemon=True).start()
    try:
        work(order)
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


if __name__ == "__main__":
    main()
