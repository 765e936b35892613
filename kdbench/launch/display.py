"""Progress of a plan on the terminal; silent where there is none."""

import sys
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.status import Status as Spinner

from kdbench.engine.spec import RunSpec
from kdbench.launch.plan import PlannedRun
from kdbench.store import Epoch, Result


class Display:
    """Two bars: the whole plan, and the current run with its loss and accuracy."""

    def __init__(self, plan: list[PlannedRun]):
        self.console = Console(file=sys.stderr)
        self.plan = plan
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
        self._current: TaskID | None = None
        self._said: set[str] = set()
        self._spec: RunSpec | None = None

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

    def on_message(self, text: str) -> None:
        """Said once, however many seeds it holds for."""
        if text in self._said:
            return
        self._said.add(text)
        self.console.print(f"kdbench: {text}", markup=False, highlight=False)

    def start(self, spec: RunSpec) -> None:
        """A run begins."""
        self.progress.start()
        self._spec = spec
        self.progress.update(self._overall, visible=True)
        self._current = self.progress.add_task(
            spec.label, total=spec.suite.total_steps, state=f"0/{spec.suite.schedule.epochs}"
        )

    def on_step(self) -> None:
        self._advance(1)

    def on_epoch(self, epoch: Epoch, resumed: bool) -> None:
        assert self._current is not None and self._spec is not None
        if resumed:
            self._advance(self._spec.suite.steps_per_epoch)
        loss = sum(epoch.losses.values())
        state = (
            f"{epoch.epoch}/{self._spec.suite.schedule.epochs}  loss {loss:.3f}  "
            f"student {epoch.metrics['student'].top1:.2f} %"
        )
        self.progress.update(self._current, state=state)

    def finish(self, result: Result) -> None:
        """A run ended, one way or another."""
        assert self._current is not None and self._spec is not None
        self.progress.remove_task(self._current)
        if not self.console.is_terminal:
            return
        outcome = result.reason or ""
        if result.last is not None and result.status == "finished":
            outcome = f"student {result.last['student'].top1:.2f} %"
        self.console.print(
            f"{result.status}: {self._spec.label}  {outcome}", markup=False, highlight=False
        )

    def _advance(self, steps: int) -> None:
        assert self._current is not None and self._spec is not None
        self.progress.update(self._current, advance=steps)
        self.progress.update(self._overall, advance=steps * self._spec.networks)


def _work(spec: RunSpec) -> int:
    """Steps weighed by the networks they train, so that the time left is about right."""
    return spec.suite.total_steps * spec.networks
