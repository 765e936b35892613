"""A request that a run end: looked at between steps, so that a checkpoint of the run is whole."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class StoppedError(KeyboardInterrupt):
    """A run was asked to stop and did; its checkpoint holds all its steps."""


class Stop:
    """Asked for by signals. Where no run heeds it, a signal interrupts at once, as Ctrl-C does."""

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        self._heeded = False

    @property
    def requested(self) -> bool:
        return bool(self.received)

    @contextlib.contextmanager
    def on(self, *signals: signal.Signals) -> Iterator[None]:
        """Inside, any of these signals asks; outside they do what they did before."""
        before = {number: signal.signal(number, self._receive) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextlib.contextmanager
    def heeded(self) -> Iterator[None]:
        """Inside, whoever runs looks at `requested` often and ends by itself."""
        self._heeded = True
        try:
            yield
        finally:
            self._heeded = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        impatient = number == signal.SIGINT and signal.SIGINT in self.received
        self.received.append(signal.Signals(number))
        if impatient or not self._heeded:
            raise KeyboardInterrupt
