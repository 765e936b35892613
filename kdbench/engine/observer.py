"""Observers, which are notified of a run's progress."""

from typing import Protocol

from kdbench.results.schema import Epoch


class Observer(Protocol):
    """Interface for displays and status files that follow a run."""

    def on_step(self) -> None:
        """Called after each training step is issued."""

    def on_epoch(self, epoch: Epoch, resumed: bool) -> None:
        """Called after each epoch, and for each evaluated epoch that a checkpoint holds.

        Epochs that were not evaluated have no metrics.
        """

    def on_resume(self, step: int) -> None:
        """Called with the steps done, if these are more than those of the evaluated epochs."""

    def on_message(self, text: str) -> None:
        """Called with a message for the user."""


class NullObserver:
    """An observer that ignores everything."""

    def on_step(self) -> None: ...

    def on_epoch(self, epoch: Epoch, resumed: bool) -> None: ...

    def on_resume(self, step: int) -> None: ...

    def on_message(self, text: str) -> None: ...


class CompositeObserver:
    """An observer that passes every notification to several others."""

    def __init__(self, *observers: Observer):
        self.observers = observers

    def on_step(self) -> None:
        for observer in self.observers:
            observer.on_step()

    def on_epoch(self, epoch: Epoch, resumed: bool) -> None:
        for observer in self.observers:
            observer.on_epoch(epoch, resumed)

    def on_resume(self, step: int) -> None:
        for observer in self.observers:
            observer.on_resume(step)

    def on_message(self, text: str) -> None:
        for observer in self.observers:
            observer.on_message(text)
