"""One run in a process of its own: `python -m kdbench.launch.worker`, a work order on its input.

Whoever started it learns from the run's files how it goes: its status, its result. It ends with
code 0 where the result is written, and with 2 and one sentence where the user can put things right.
Where torchrun starts several to train the run together, the order is a file that they are given.
"""

import contextlib
import os
import signal
import sys
from functools import partial
from pathlib import Path

from kdbench.data import is_cached, locate
from kdbench.engine.compile_mode import resolve_compile_mode
from kdbench.engine.device import make_accelerator
from kdbench.engine.observer import Observer
from kdbench.engine.spec import RunSpec
from kdbench.engine.stop import Stop
from kdbench.errors import PlanAbandonedError, UnwritableError, UserError
from kdbench.launch.claim import claimed
from kdbench.launch.death import UNWRITABLE
from kdbench.launch.dispatch import at_its_turn
from kdbench.launch.execution import open_images_together, run_and_save
from kdbench.launch.order import WorkOrder
from kdbench.launch.place import Place, end_with
from kdbench.launch.ranks import Ranks, tell, together
from kdbench.launch.status import NoReporter, StatusReporter, leave_word
from kdbench.results.schema import Result
from kdbench.signals import SIGNALS


def work(order: WorkOrder, stop: Stop) -> Result:
    """Carry out an order; the result is written and returned.

    The run's status says how it ended, unless by an error that is no fault of the user.

    Raises:
        TakenError: another process has the run.
        UserError: data that cannot be read, a folder that cannot be written, a changed method.
        PlanAbandonedError: the run failed, and its processes are out of step.
        KeyboardInterrupt: it was stopped.
    """
    with together(order.how.processes, _say) as ranks:
        try:
            spec = order.spec()
        except UserError as error:
            if ranks.is_main:
                leave_word(order.folder, "failed", str(error))
            raise
        # What was sent to a cluster has nobody who would send it again later.
        with claimed(spec, order.how, ranks, wait=order.ticket is not None) as made:
            if made is not None:
                return made
            with _reporter(order, spec, ranks) as reporter:
                ranks.on_left = partial(tell, reporter)
                result = _train(order, spec, ranks, reporter, stop)
                reporter.end(result.status, result.reason)
    return result


def main() -> None:
    """Carry out the order on standard input, or in the file that is named."""
    stop = Stop()
    with stop.on(*SIGNALS):
        file = sys.argv[1:]
        text = Path(file[0]).read_bytes() if file else sys.stdin.buffer.read()
        order = WorkOrder.model_validate_json(text)
        if order.parent is not None:
            end_with(order.parent if order.how.processes == 1 else os.getppid())
        try:
            work(order, stop)
        except (UserError, PlanAbandonedError) as error:
            if Place.of_this_process().rank == 0:
                _say(str(error))
            sys.exit(UNWRITABLE if isinstance(error, UnwritableError) else error.exit_code)
        except KeyboardInterrupt:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)


def _reporter(order: WorkOrder, spec: RunSpec, ranks: Ranks) -> StatusReporter | NoReporter:
    if not ranks.is_main:
        return NoReporter()
    # Of several processes the end of their launcher is the end of the run.
    pid = os.getpid() if ranks.count == 1 else os.getppid()
    return StatusReporter(order.folder, spec, order.ticket, pid)


def _train(order: WorkOrder, spec: RunSpec, ranks: Ranks, observer: Observer, stop: Stop) -> Result:
    how = at_its_turn(order)
    accelerator = make_accelerator(how.runs, how.tensorboard, deterministic=how.deterministic)
    place = accelerator.device, accelerator.num_processes
    mode = resolve_compile_mode(how.compile, spec.suite, spec.architecture, *place)
    source = locate(spec.suite.data, how.data_dir, is_cached)
    images = open_images_together(source, accelerator.device, how, ranks)
    return run_and_save(spec, images, how, accelerator, observer, mode, order.jobs, ranks, stop)


def _say(sentence: str) -> None:
    with contextlib.suppress(OSError):  # they go to a file, and the disk may be full
        print(f"kdbench: {sentence}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
