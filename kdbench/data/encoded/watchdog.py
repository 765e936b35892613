"""Ends processes that keep this one waiting, where waiting itself has no time-out."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from typing import Self

LOOKS = 4
"""In the time that it has patience for."""


class Watchdog(threading.Thread):
    """Kills the processes once this one has waited for them that long; inside `with` it looks."""

    def __init__(self, processes: Sequence[BaseProcess], seconds: float):
        super().__init__(daemon=True)
        self.has_bitten = False
        self._processes, self._seconds = processes, seconds
        self._since: float | None = None
        self._ended = threading.Event()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Inside, this process waits."""
        self._since = time.monotonic()
        try:
            yield
        finally:
            self._since = None

    def run(self) -> None:
        while not self._ended.wait(self._seconds / LOOKS):
            since = self._since
            if since is not None and time.monotonic() - since > self._seconds:
                self.has_bitten = True
                for process in self._processes:
                    process.kill()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
