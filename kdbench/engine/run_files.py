"""What a run keeps in its folder while it trains: its log, and its checkpoints.

It needs neither to come to its result. Where the disk takes them no more, it says so and goes on.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Thread
from typing import Any

from kdbench.atomic import atomic_write
from kdbench.engine.checkpoint import write_checkpoint
from kdbench.errors import UnwritableError
from kdbench.results.schema import Epoch
from kdbench.signals import WRITING

LOG = "log.jsonl"


def goes_on_without(folder: Path, error: UnwritableError) -> str:
    """What the user should know of a run whose folder takes no file."""
    return (
        f"Cannot write to '{folder}': {error.reason}; the run goes on, and until that is mended a "
        "kill costs what it did since its last checkpoint."
    )


class Writing(Thread):
    """Of a checkpoint, beside training. Python must not end meanwhile: tensors are freed in it."""

    def __init__(self, folder: Path, content: dict[str, Any], step: int):
        super().__init__(name=WRITING, daemon=True)  # or Python waits for it, whoever is in a hurry
        self._task = folder, content, step
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            write_checkpoint(*self._task)
        except BaseException as error:  # whoever waits raises it
            self._error = error
        del self._task

    def finish(self) -> None:
        """Wait for its end; raises what went wrong."""
        self.join()
        if self._error is not None:
            raise self._error


class RunFiles:
    """Of one run; its main process writes them."""

    def __init__(self, folder: Path, say: Callable[[str], None]):
        self.folder = folder
        self._say = say
        self._said = False
        self._writing: Writing | None = None

    def write_log(self, history: Sequence[Epoch]) -> None:
        """All epochs so far, a line each; whole, so that a full disk leaves no half line."""
        with self._said_once(), atomic_write(self.folder / LOG, durable=False) as stream:
            stream.writelines(epoch.model_dump_json().encode() + b"\n" for epoch in history)

    def save_checkpoint(self, content: dict[str, Any], step: int) -> None:
        """Begin to write what `snapshot` gave, beside training; the one before is written then."""
        self.finish()
        self._writing = Writing(self.folder, content, step)
        self._writing.start()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            with self._said_once():
                writing.finish()

    def close(self) -> None:
        """The same for a run that failed: what goes wrong here costs that checkpoint alone."""
        try:
            self.finish()
        except Exception as error:  # a writer may run out of memory, say
            self._say(f"The last checkpoint in '{self.folder}' was not written: {error!r}.")

    @contextlib.contextmanager
    def _said_once(self) -> Iterator[None]:
        try:
            yield
        except UnwritableError as error:
            if not self._said:
                self._said = True
                self._say(goes_on_without(self.folder, error))
