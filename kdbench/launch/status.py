"""How far a run is: a small file in its folder, which whoever watches the run reads."""

import os
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from kdbench.atomic import written_whole
from kdbench.engine.spec import RunSpec
from kdbench.store import Epoch, Record

FILE = "status.json"
WRITE_SECONDS = 1.0
"""Between two writings while nothing but the step changes."""

State = Literal["starting", "running", "finished", "diverged", "failed", "stopped"]
"""Stopped: from outside, and to be gone on with."""


class RunStatus(Record):
    """How far a run is. One whose process was killed says `running` for ever; see `updated`."""

    state: State = "starting"
    epoch: int = 0
    """Whole epochs done."""
    epochs: int
    step: int = 0
    """Training steps issued, those of a checkpoint included."""
    steps: int
    """Of the whole run."""
    loss: float | None = None
    """Sum of all terms, mean of the last whole epoch."""
    top1: float | None = None
    """Of the student after the last whole epoch, per cent."""
    messages: tuple[str, ...] = ()
    """What the user should know."""
    pid: int
    """Process whose end is the run's: of several that train it together, their launcher."""
    started: datetime
    updated: datetime


def read_status(folder: Path) -> RunStatus | None:
    """The status of the run whose folder this is; None where there is none that can be read."""
    try:
        return RunStatus.model_validate_json((folder / FILE).read_bytes())
    except (OSError, ValidationError):
        return None


def write_status(folder: Path, status: RunStatus) -> None:
    """Replace the status file in one step.

    Raises:
        UserError: the folder cannot be written.
    """
    with written_whole(folder / FILE, durable=False) as stream:
        stream.write(status.model_dump_json(indent=1).encode() + b"\n")


class StatusReporter:
    """Observes a run and keeps its status file up to date."""

    def __init__(self, folder: Path, spec: RunSpec, pid: int | None = None):
        self.folder = folder
        self.steps_per_epoch = spec.suite.steps_per_epoch
        now = datetime.now(UTC)
        self.status = RunStatus(
            epochs=spec.suite.schedule.epochs,
            steps=spec.suite.total_steps,
            pid=os.getpid() if pid is None else pid,
            started=now,
            updated=now,
        )
        self.step = 0
        self._written = 0.0
        self._write()

    def on_step(self) -> None:
        self.step += 1
        if time.monotonic() - self._written >= WRITE_SECONDS:
            self._write(state="running")

    def on_epoch(self, epoch: Epoch, resumed: bool) -> None:
        self.step = epoch.epoch * self.steps_per_epoch
        loss, top1 = sum(epoch.losses.values()), epoch.metrics["student"].top1
        self._write(state="running", epoch=epoch.epoch, loss=loss, top1=top1)

    def on_message(self, text: str) -> None:
        self._write(messages=(*self.status.messages, text))

    def end(self, state: State) -> None:
        """The run came to an end."""
        self._write(state=state)

    def _write(self, **changes: object) -> None:
        changes |= {"step": self.step, "updated": datetime.now(UTC)}
        self.status = self.status.model_copy(update=changes)
        write_status(self.folder, self.status)
        self._written = time.monotonic()
