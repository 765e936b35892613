"""Progress of a plan: bars on a terminal, a line now and then where there is none."""

import math
import sys
import time
from datetime import timedelta
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TextColumn, TimeRemainingColumn
from rich.status import Status as Spinner

from kdbench.engine.spec import RunSpec
from kdbench.launch.plan import PlannedRun
from kdbench.launch.status import RunStatus
from kdbench.results.schema import Epoch, Result

LOG_SECONDS = 60.0
"""Between two lines on a run in a log, where no bar can be drawn; before it has none at all."""

PACE_SECONDS = 600.0
"""Over which the time left is estimated: evaluations and slow steps among them."""

SAMPLE_SECONDS = PACE_SECONDS / 1000
"""Between two that it is estimated from; no more than 1,000 are kept."""


class Bar:
    """One of rich's, moved seldom enough for what it keeps to reach back PACE_SECONDS."""

    def __init__(
        self, progress: Progress, description: str, total: int, state: str, visible: bool = True
    ):
        self._progress = progress
        self._task = progress.add_task(description, total=total, state=state, visible=visible)
        self._moved = -math.inf

    @property
    def task(self) -> Task:
        """Rich's own."""
        return self._progress.tasks[self._progress.task_ids.index(self._task)]

    def move(self, completed: int, trained: bool) -> None:
        """What comes too soon after the last is shown with the next.

        What was not `trained`, but found in a checkpoint, say, is no pace to go by.
        """
        now = time.monotonic()
        if not trained:
            self._progress.reset(self._task, completed=completed)
        elif now - self._moved >= SAMPLE_SECONDS:
            self._progress.update(self._task, completed=completed)
            self._moved = now

    def show(self) -> None:
        self._progress.update(self._task, visible=True)

    def describe(self, state: str) -> None:
        self._progress.update(self._task, state=state)

    def remove(self) -> None:
        self._progress.remove_task(self._task)


class Display:
    """A bar for the whole plan, and one for each run under way with its loss and accuracy."""

    def __init__(self, plan: list[PlannedRun]):
        self.console = Console(file=sys.stderr)
        self.progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f} %"),
            TextColumn("{task.fields[state]}"),
            TimeRemainingColumn(),
            console=self.console,
            speed_estimate_period=PACE_SECONDS,
            disable=not self.console.is_terminal,
        )
        work = sum(_work(run.spec) for run in plan if run.state == "to run")
        self._plan = Bar(self.progress, "plan", work, state="", visible=False)
        self._done = 0
        """Of that work."""
        self._said: set[str] = set()
        self._began = time.monotonic()

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.progress.stop()

    def note(self, text: str) -> Spinner:
        """A spinner beside what is being done before the first run."""
        self.progress.stop()  # rich shows one live display at a time
        return Spinner(text + " ...", console=self.console)

    def say(self, text: str) -> None:
        """Said once, however many seeds it holds for."""
        if text in self._said:
            return
        self._said.add(text)
        self.print(f"kdbench: {text}")

    def print(self, text: str) -> None:
        """A line above the bars."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def start(self, spec: RunSpec) -> "RunBar":
        """A run begins."""
        self.progress.start()
        self._plan.show()
        return RunBar(self, spec)

    def advance(self, work: int, trained: bool) -> None:
        """The plan as a whole."""
        self._done += work
        self._plan.move(self._done, trained)

    @property
    def is_brief(self) -> bool:
        """A log of what takes less than a minute: its table says it all."""
        return not self.console.is_terminal and time.monotonic() - self._began < LOG_SECONDS

    def log(self, text: str) -> None:
        """How far a run is, and with it the plan."""
        plan = self._plan.task
        left = plan.time_remaining
        pace = "" if left is None else f", {timedelta(seconds=left)} left"
        self.print(f"under way: {text}  (plan {plan.percentage:.0f} %{pace})")


class RunBar:
    """The bar of a run: its observer in this process, or shown the status of another."""

    def __init__(self, display: Display, spec: RunSpec):
        self.display = display
        self.spec = spec
        self.step = 0
        self._state = f"0/{spec.suite.schedule.epochs}"
        self._bar = Bar(display.progress, spec.label, spec.suite.total_steps, self._state)
        self._logged = time.monotonic()

    def on_step(self) -> None:
        self._move(self.step + 1)

    def on_epoch(self, epoch: Epoch, resumed: bool) -> None:
        top1 = epoch.metrics["student"].top1 if epoch.metrics else None
        self._describe(epoch.epoch, sum(epoch.losses.values()), top1)
        self._move(epoch.epoch * self.spec.suite.steps_per_epoch, trained=not resumed)

    def on_resume(self, step: int) -> None:
        self._move(step, trained=False)

    def on_message(self, text: str) -> None:
        self.display.say(text)

    def show(self, status: RunStatus) -> None:
        """How far the run is in its own process."""
        if status.loss is not None:
            self._describe(status.epoch, status.loss, status.top1)
        if status.step != self.step:
            self._move(status.step, trained=self.step > 0)
        for message in status.messages:
            self.display.say(message)

    def finish(self, result: Result) -> None:
        """The run ended, one way or another: nothing of it is left to do."""
        self._move(self.spec.suite.total_steps, trained=False)
        self.leave()
        outcome = result.reason or ""
        if result.last is not None and result.status == "finished":
            outcome = f"student {result.last['student'].top1:.2f} %"
        if not self.display.is_brief:
            self.display.print(f"{result.status}: {self.spec.label}  {outcome}")

    def leave(self) -> None:
        """Another command has the run."""
        self._bar.remove()

    def _move(self, step: int, trained: bool = True) -> None:
        work = (step - self.step) * self.spec.networks
        self.step = step
        self._bar.move(step, trained)
        self.display.advance(work, trained)
        now = time.monotonic()
        if not self.display.console.is_terminal and now - self._logged >= LOG_SECONDS:
            self._logged = now
            share = self.step / self.spec.suite.total_steps
            self.display.log(f"{self.spec.label}  {share:.0%}  {self._state}")

    def _describe(self, epoch: int, loss: float, top1: float | None) -> None:
        epochs = self.spec.suite.schedule.epochs
        self._state = f"{epoch}/{epochs}  loss {loss:.3f}"
        if top1 is not None:
            self._state += f"  student {top1:.2f} %"
        self._bar.describe(self._state)


def _work(spec: RunSpec) -> int:
    """Steps weighed by the networks they train, so that the time left is about right."""
    return spec.suite.total_steps * spec.networks
