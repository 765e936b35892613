"""The signals that ask a run to end."""

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Ctrl-C, and what cluster managers send before they take a node away."""


def leave_to_the_run(worker: int = 0) -> None:
    """For processes that load data (`worker_init_fn`): managers signal all processes of a run.

    The run ends them when it has ended; without its data it could not finish its step.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


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
