"""Handling of the signals that stop a run."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, NoReturn

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Ctrl-C, and the signals that cluster managers send before they reclaim a node."""


CHECKPOINT_THREAD_NAME = "writes a checkpoint"
"""Name of the thread that writes checkpoints. Python would abort if it exited meanwhile."""


class SignalledError(KeyboardInterrupt):
    """Raised when one of SIGNALS arrives; a plain KeyboardInterrupt means Ctrl-C."""

    def __init__(self, number: int = signal.SIGINT):
        super().__init__()
        self.number = number


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """Return the exit code that shells use for a signal: 130 for Ctrl-C, 143 for SIGTERM."""
    return 128 + (interrupt.number if isinstance(interrupt, SignalledError) else signal.SIGINT)


def exit_process(code: int) -> NoReturn:
    """Exit this process, immediately if a checkpoint is still being written."""
    if any(thread.name == CHECKPOINT_THREAD_NAME for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def ignore_stop_signals() -> None:
    """Ignore SIGNALS in a process that loads data.

    Cluster managers signal all processes of a run. The run needs its data to finish the current
    step, and stops these processes itself.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def exit_with_parent() -> None:
    """Make this `multiprocessing` process exit when its parent exits, even if that is killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def handled(
    signals: tuple[signal.Signals, ...], handler: Callable[[int, FrameType | None], Any]
) -> Iterator[None]:
    """Handle signals within this context, and restore the earlier handlers afterwards."""
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)
