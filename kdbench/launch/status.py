"""How far a run is: a small file in its folder, which whoever watches the run reads."""

import contextlib
import os
import threading
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Literal, Self

from pydantic import ValidationError

from kdbench.atomic import atomic_write
from kdbench.engine.observer import NullObserver
from kdbench.errors import PlanAbandonedError, UnwritableError, UserError
from kdbench.results.schema import Epoch, Record

if TYPE_CHECKING:
    from kdbench.engine.spec import RunSpec  # which imports torch, and readers need not

FILE = "status.json"
WRITE_SECONDS = 1.0
"""Between two writings while nothing but the step changes."""
HEARTBEAT_SECONDS = 30.0
"""Between two signs of life while no step ends: reading images, compiling, evaluating."""

State = Literal["queued", "starting", "running", "finished", "diverged", "failed", "stopped"]
"""Stopped: from outside, and to be gone on with."""


class Ticket(Record):
    """Which submission a run was sent with, and its place in it."""

    submission: str
    task: int


class RunStatus(Record):
    """How far a run is. One whose process was killed says `running` for ever; see `updated`."""

    state: State = "starting"
    reason: str | None = None
    """Why it is in this state, where that is worth a word."""
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
    ticket: Ticket | None = None
    """Where it was submitted."""
    pid: int | None = None
    """Process whose end is the run's: of several that kdbench started, their launcher. None where
    no process has had it yet."""
    started: datetime
    updated: datetime
    """The last sign of life."""
    first_step: int = 0
    """After which this process began to measure its pace."""
    measured_since: datetime | None = None

    @property
    def time_left(self) -> timedelta | None:
        """At the pace of this process; None before it has one."""
        done = self.step - self.first_step
        if self.measured_since is None or done < 1:
            return None
        return (self.updated - self.measured_since) / done * (self.steps - self.step)


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
    with atomic_write(folder / FILE, durable=False) as stream:
        stream.write(status.model_dump_json(indent=1).encode() + b"\n")


def change_status(folder: Path, state: State, reason: str | None = None) -> None:
    """Put a run that has a status into another state.

    Raises:
        UserError: the folder cannot be written.
    """
    status = read_status(folder)
    if status is not None:
        changes = {"state": state, "reason": reason, "updated": datetime.now(UTC)}
        write_status(folder, status.model_copy(update=changes))


def leave_word(folder: Path, state: State, reason: str | None = None) -> None:
    """The same, where the disk takes it: of a run that is over for another reason already."""
    with contextlib.suppress(UnwritableError):
        change_status(folder, state, reason)


class StatusReporter:
    """Observes a run and keeps its status file up to date.

    In a `with` block it also gives signs of life while no step ends, and says why a run was left.
    A folder that takes no status takes no run; one that takes it no more ends none.
    """

    def __init__(
        self,
        folder: Path,
        spec: "RunSpec",
        ticket: Ticket | None = None,
        pid: int | None = None,
    ):
        self.folder = folder
        self.steps_per_epoch = spec.suite.steps_per_epoch
        now = datetime.now(UTC)
        self.status = RunStatus(
            epochs=spec.suite.schedule.epochs,
            steps=spec.suite.total_steps,
            ticket=ticket,
            pid=os.getpid() if pid is None else pid,
            started=now,
            updated=now,
        )
        self.step = 0
        self.unwritten: UnwritableError | None = None
        """Why the last word could not be written."""
        self._written = 0.0
        self._lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, daemon=True)
        write_status(folder, self.status)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ended.set()
        self._thread.join()
        if isinstance(error, KeyboardInterrupt):
            self._write(state="stopped")
        elif isinstance(error, UserError | PlanAbandonedError):
            self._write(state="failed", reason=str(error))

    def on_step(self) -> None:
        self.step += 1
        if self.status.measured_since is None:  # the first step may compile
            self._write(state="running", first_step=self.step, measured_since=datetime.now(UTC))
        elif time.monotonic() - self._written >= WRITE_SECONDS:
            self._write(state="running")

    def on_epoch(self, epoch: Epoch, resumed: bool) -> None:
        self.step = epoch.epoch * self.steps_per_epoch
        accuracy = {"top1": epoch.metrics["student"].top1} if epoch.metrics else {}
        self._write(state="running", epoch=epoch.epoch, loss=sum(epoch.losses.values()), **accuracy)

    def on_resume(self, step: int) -> None:
        self.step = step

    def on_message(self, text: str) -> None:
        self._write(messages=(*self.status.messages, text))

    def end(self, state: State, reason: str | None = None) -> None:
        """The run came to an end."""
        self._ended.set()
        self._write(state=state, reason=reason)

    def left(self, state: State, reason: str) -> None:
        """Its processes end while it is under way."""
        if not self._ended.is_set():
            self.end(state, reason)

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            self._write()

    def _write(self, **changes: object) -> None:
        with self._lock:
            changes |= {"step": self.step, "updated": datetime.now(UTC)}
            self.status = self.status.model_copy(update=changes)
            self.unwritten = None
            try:
                write_status(self.folder, self.status)
            except UnwritableError as error:
                self.unwritten = error
            self._written = time.monotonic()


class NoReporter(NullObserver):
    """In the place of one, for a process that has no say about the run's files."""

    unwritten = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...

    def end(self, state: State, reason: str | None = None) -> None: ...

    def left(self, state: State, reason: str) -> None: ...
