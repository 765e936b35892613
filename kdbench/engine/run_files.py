"""The log and the checkpoints that a run keeps in its folder while it trains.

A run can finish without either. If they cannot be written, it warns and continues.
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
from kdbench.signals import CHECKPOINT_THREAD_NAME

LOG = "log.jsonl"


def unwritable_folder_warning(folder: Path, error: UnwritableError) -> str:
    """Return the warning for a run whose folder cannot be written to."""
    return (
        f"Cannot write to '{folder}': {error.reason}. The run continues, but until this is fixed "
        "it would lose its progress since the last checkpoint if it were killed."
    )


class CheckpointWriter(Thread):
    """Thread that writes a checkpoint while training continues.

    Python must not exit while it runs, because it frees tensors.
    """

    def __init__(self, folder: Path, content: dict[str, Any], step: int):
        # A daemon thread, so that an impatient second Ctrl-C need not wait for it.
        super().__init__(name=CHECKPOINT_THREAD_NAME, daemon=True)
        self._task = folder, content, step
        self._error: BaseException | None = None

    def run(self) -> None:
        try:
            write_checkpoint(*self._task)
        except BaseException as error:  # raised again in finish()
            self._error = error
        del self._task

    def finish(self) -> None:
        """Wait until the checkpoint is written, and raise any error that occurred."""
        self.join()
        if self._error is not None:
            raise self._error


class RunFiles:
    """The files of one run, written by its main process."""

    def __init__(self, folder: Path, on_message: Callable[[str], None]):
        self.folder = folder
        self._on_message = on_message
        self._warned = False
        self._writer: CheckpointWriter | None = None

    def write_log(self, history: Sequence[Epoch]) -> None:
        """Write all epochs so far, one per line; atomically, so that no partial line is left."""
        with self._warn_once(), atomic_write(self.folder / LOG, durable=False) as stream:
            stream.writelines(epoch.model_dump_json().encode() + b"\n" for epoch in history)

    def save_checkpoint(self, content: dict[str, Any], step: int) -> None:
        """Start writing the content that `snapshot` returned, after the previous write is done."""
        self.finish()
        self._writer = CheckpointWriter(self.folder, content, step)
        self._writer.start()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with self._warn_once():
                writer.finish()

    def close(self) -> None:
        """Wait likewise after a failed run; an error here loses only this checkpoint."""
        try:
            self.finish()
        except Exception as error:  # for instance, out of memory
            self._on_message(f"The last checkpoint in '{self.folder}' was not written: {error!r}.")

    @contextlib.contextmanager
    def _warn_once(self) -> Iterator[None]:
        try:
            yield
        except UnwritableError as error:
            if not self._warned:
                self._warned = True
                self._on_message(unwritable_folder_warning(self.folder, error))
