"""The signals that ask a run to end."""

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
"""Ctrl-C, and what cluster managers send before they take a node away."""


CHECKPOINT_THREAD_NAME = "writes a checkpoint"
"""Name of a thread that Python must not end beside: it would abort."""


class SignalledError(KeyboardInterrupt):
    """One of these signals came; a plain KeyboardInterrupt is Ctrl-C."""

    def __init__(self, number: int = signal.SIGINT):
        super().__init__()
        self.number = number


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """What shells make of the signal: 130 after Ctrl-C, 143 after SIGTERM."""
    return 128 + (interrupt.number if isinstance(interrupt, SignalledError) else signal.SIGINT)


def leave(code: int) -> NoReturn:
    """End this process: at once beside a checkpoint that a user in a hurry does not wait for."""
    if any(thread.name == CHECKPOINT_THREAD_NAME for thread in threading.enumerate()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def leave_to_the_run() -> None:
    """For processes that load data: managers signal all processes of a run.

    The run ends them when it has ended; without its data it could not finish its step.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def end_with_parent() -> None:
    """For processes of `multiprocessing`: one that is killed cannot end them."""
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
    """Inside, the handler has these signals; outside they do what they did before."""
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, handler_before in before.items():
            signal.signal(number, handler_before)
