"""Stop requests from signals, honored between steps so that a consistent checkpoint is saved."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

from kdbench.signals import SignalledError, handled


class StoppedError(SignalledError):
    """Raised when a run has stopped on request; its checkpoint holds all completed steps."""


class Stop:
    """Stop request that signals set.

    A signal is deferred while a run checks for requests, and interrupts at once otherwise.
    """

    def __init__(self) -> None:
        self.received: list[signal.Signals] = []
        self._deferred = False

    @property
    def requested(self) -> bool:
        return bool(self.received)

    def on(self, *signals: signal.Signals) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the given signals request a stop."""
        return handled(signals, self._receive)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Defer signals: inside this context the caller polls `requested` and stops on its own.

        A second Ctrl-C still interrupts at once.
        """
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        impatient = number == signal.SIGINT and signal.SIGINT in self.received
        self.received.append(signal.Signals(number))
        if impatient or not self._deferred:
            raise SignalledError(number)
