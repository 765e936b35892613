"""Progress of a plan on the terminal; silent where there is none."""

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.status import Status as Spinner

from kdbench.engine.spec import RunSpec
from kdbench.launch.plan import PlannedRun
from kdbench.launch.status import RunStatus
from kdbench.store import Epoch, Result


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
            disable=not self.console.is_terminal,
        )
        work = sum(_work(run.spec) for run in plan if run.state == "to run")
        self._overall = self.progress.add_task("plan", total=work, state="", visible=False)
        self._said: set[str] = set()

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
        self.console.print(f"kdbench: {text}", markup=False, highlight=False, soft_wrap=True)

    def start(self, spec: RunSpec) -> "RunBar":
        """A run begins."""
        self.progress.start()
        self.progress.update(self._overall, visible=True)
        epochs, steps = spec.suite.schedule.epochs, spec.suite.total_steps
        task = self.progress.add_task(spec.label, total=steps, state=f"0/{epochs}")
        return RunBar(self, spec, task)

    def advance(self, work: int) -> None:
        """The plan as a whole."""
        self.progress.update(self._overall, advance=work)


class RunBar:
    """The bar of a run: its observer in this process, or shown the status of another."""

    def __init__(self, display: Display, spec: RunSpec, task: TaskID):
        self.display = display
        self.spec = spec
        self.step = 0
        self._task = task

    def on_step(self) -> None:
        self._move(self.step + 1)

    def on_epoch(self, epoch: Epoch, resumed: bool) -> None:
        self._move(epoch.epoch * self.spec.suite.steps_per_epoch)
        self._describe(epoch.epoch, sum(epoch.losses.values()), epoch.metrics["student"].top1)

    def on_resume(self, step: int) -> None:
        self._move(step)

    def on_message(self, text: str) -> None:
        self.display.say(text)

    def show(self, status: RunStatus) -> None:
        """How far the run is in its own process."""
        self._move(status.step)
        if status.loss is not None and status.top1 is not None:
            self._describe(status.epoch, status.loss, status.top1)
        for message in status.messages:
            self.display.say(message)

    def finish(self, result: Result) -> None:
        """The run ended, one way or another."""
        self.leave()
        if not self.display.console.is_terminal:
            return
        outcome = result.reason or ""
        if result.last is not None and result.status == "finished":
            outcome = f"student {result.last['student'].top1:.2f} %"
        self.display.console.print(
            f"{result.status}: {self.spec.label}  {outcome}", markup=False, highlight=False
        )

    def leave(self) -> None:
        """Another command has the run."""
        self.display.progress.remove_task(self._task)

    def _move(self, step: int) -> None:
        self.display.progress.update(self._task, completed=step)
        self.display.advance((step - self.step) * self.spec.networks)
        self.step = step

    def _describe(self, epoch: int, loss: float, top1: float) -> None:
        epochs = self.spec.suite.schedule.epochs
        state = f"{epoch}/{epochs}  loss {loss:.3f}  student {top1:.2f} %"
        self.display.progress.update(self._task, state=state)


def _work(spec: RunSpec) -> int:
    """Steps weighed by the networks they train, so that the time left is about right."""
    return spec.suite.total_steps * spec.networks
