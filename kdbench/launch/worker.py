"""One run in a process of its own: `python -m kdbench.launch.worker`, a work order on its input.

Whoever started it learns from the run's files how it goes: its status, its result. It ends with
code 0 where the result is written, and with 2 and one sentence where the user can put things right.
Where torchrun starts several to train the run together, the order is a file that they are given.
"""

import os
import signal
import sys
from pathlib import Path

from kdbench.data import is_cached, locate
from kdbench.engine.device import make_accelerator
from kdbench.engine.mode import step_mode
from kdbench.engine.run import Observer, Unobserved
from kdbench.errors import PlanAbandonedError, UserError
from kdbench.launch.execution import open_images_together, run_and_save, run_folder
from kdbench.launch.order import WorkOrder
from kdbench.launch.place import Place, end_with
from kdbench.launch.ranks import Ranks, together
from kdbench.launch.status import State, StatusReporter
from kdbench.store import Result


def work(order: WorkOrder) -> Result:
    """Carry out an order; the result is written and returned.

    Raises:
        UserError: data that cannot be read, a folder that cannot be written, a changed method.
        PlanAbandonedError: the run failed, and its processes are out of step.
    """
    with together(order.how.processes, _say) as ranks:
        if not ranks.is_main:
            return _train(order, ranks, Unobserved())
        return _train_with_status(order, ranks)


def main() -> None:
    """Carry out the order on standard input, or in the file that is named."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that files are cleared away
    file = sys.argv[1:]
    text = Path(file[0]).read_bytes() if file else sys.stdin.buffer.read()
    order = WorkOrder.model_validate_json(text)
    if order.parent is not None:
        end_with(order.parent if order.how.processes == 1 else os.getppid())
    try:
        work(order)
    except (UserError, PlanAbandonedError) as error:
        if Place.of_this_process().rank == 0:
            _say(str(error))
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGTERM)


def _train_with_status(order: WorkOrder, ranks: Ranks) -> Result:
    spec = order.spec()
    # Of several processes the end of their launcher is the end of the run.
    pid = os.getpid() if ranks.count == 1 else os.getppid()
    reporter = StatusReporter(run_folder(order.how.runs, spec), spec, pid)
    state: State = "failed"
    try:
        result = _train(order, ranks, reporter)
        state = result.status
        return result
    except KeyboardInterrupt:
        state = "stopped"
        raise
    finally:
        reporter.end(state)


def _train(order: WorkOrder, ranks: Ranks, observer: Observer) -> Result:
    spec, how = order.spec(), order.how
    accelerator = make_accelerator(how.runs, how.tensorboard)
    place = accelerator.device, accelerator.num_processes
    mode = step_mode(how.compile, spec.suite, spec.architecture, *place)
    source = locate(spec.suite.data, how.data_dir, is_cached)
    images = open_images_together(source, accelerator.device, how, ranks)
    return run_and_save(spec, images, how, accelerator, observer, mode, order.jobs, ranks)


def _say(sentence: str) -> None:
    print(f"kdbench: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
