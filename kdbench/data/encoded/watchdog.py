"""A watchdog that kills processes on which this process has waited too long.

It serves waits that have no timeout themselves.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Self

POLLS_PER_TIMEOUT = 4
"""Number of times that the watchdog checks the wait within its timeout."""


class Watchdog(threading.Thread):
    """A thread that kills `processes` if this process waits longer than `seconds` for them.

    It runs while its context is open.
    """

    def __init__(self, processes: Sequence[BaseProcess], seconds: float):
        super().__init__(daemon=True)
        self.timed_out = False
        self._processes, self._seconds = processes, seconds
        self._wait_started: float | None = None
        self._ended = threading.Event()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Mark the body of the `with` statement as waiting for the processes."""
        self._wait_started = time.monotonic()
        try:
            yield
        finally:
            self._wait_started = None

    def run(self) -> None:
        while not self._ended.wait(self._seconds / POLLS_PER_TIMEOUT):
            started = self._wait_started
            if started is not None and time.monotonic() - started > self._seconds:
                self.timed_out = True
                for process in self._processes:
                    process.kill()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
