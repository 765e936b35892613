"""A request that a run end: looked at between steps, so that a checkpoint of the run is whole."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from kdbench.signals import SignalledError, handled


class StoppedError(SignalledError):
    """A run was asked to stop and did; its checkpoint holds all its steps."""


class Stop:
    """Asked for by signals. Where no run heeds it, a signal interrupts at once, as Ctrl-C does."""

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        self._heeded = False

    @property
    def requested(self) -> bool:
        return bool(self.received)

    def on(self, *signals: signal.Signals) -> contextlib.AbstractContextManager[None]:
        """Inside, any of these signals asks; outside they do what they did before."""
        return handled(signals, self._receive)

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
            raise SignalledError(number)
