"""Runs a plan in several processes at a time, each run in one of its own."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Generator, Iterator

import torch

from kdbench.data import Source, open_images
from kdbench.engine.device import make_accelerator
from kdbench.engine.run import empty_result
from kdbench.errors import UserError
from kdbench.launch.display import Display
from kdbench.launch.execution import Execution, run_folder, without_paths
from kdbench.launch.order import WorkOrder
from kdbench.launch.plan import PlannedRun
from kdbench.launch.shares import Shares
from kdbench.launch.status import read_status, write_status
from kdbench.store import Result, check_writable, read, save

POLL_SECONDS = 0.2
GRACE_SECONDS = 10.0
"""Between asking a process to end and killing it."""


def run_in_processes(
    todo: list[PlannedRun], jobs: int, source: Source, how: Execution, display: Display
) -> Generator[Result]:
    """The result of each run, when it exists; no process is left when this ends.

    Raises:
        UserError: one that a process met, or this one for it.
        KeyboardInterrupt: the user stopped it, or SIGTERM did.
    """
    with display.note(source.reading()):
        open_images(
            source, torch.device("cpu"), workers=0
        )  # the processes then find them in the cache
    shares = Shares.among(jobs)
    waiting = deque(todo)
    children: dict[int, Child] = {}
    with _interrupted_by_sigterm():
        try:
            while waiting or children:
                for slot in set(range(jobs)) - set(children):
                    if waiting:
                        children[slot] = Child(waiting.popleft(), how, shares, slot, display)
                time.sleep(POLL_SECONDS)
                for slot, child in list(children.items()):
                    result = child.poll()
                    if result is not None:
                        del children[slot]
                        yield result
        finally:
            _end([child.process for child in children.values()])


class Child:
    """A run in a process of its own."""

    def __init__(
        self, run: PlannedRun, how: Execution, shares: Shares, slot: int, display: Display
    ):
        self.run, self.how, self.shares = run, how, shares
        self.folder = run_folder(how.runs, run.spec)
        self.log = self.folder / "worker.log"
        check_writable(self.folder)
        self._result_before = self._result_written()
        order = WorkOrder.of(run.spec, how, shares.on_a_device, parent=os.getpid())
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-P", "-m", "kdbench.launch.worker"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=shares.environment(slot),
                process_group=0,  # a terminal sends Ctrl-C to this process alone
            )
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self.process.stdin as stream:
            stream.write(order.model_dump_json().encode())
        self.line = display.start(run.spec)

    def poll(self) -> Result | None:
        """Show how far the run is; its result once the process has ended.

        Raises:
            UserError: the process met one.
        """
        ended = self.process.poll() is not None
        status = read_status(self.folder)
        if status is not None and status.pid == self.process.pid:
            self.line.show(status)
        if not ended:
            return None
        result = self._outcome()
        self.line.finish(result)
        return result

    def _outcome(self) -> Result:
        # A process may fail after its result is written, while it is taken down.
        if self._result_written() != self._result_before:
            found = read(self.run.file)
            if isinstance(found, Result):
                return found
        code, last = self.process.returncode, self._last_words()
        if code == 2 and last.startswith("kdbench: "):
            raise UserError(last.removeprefix("kdbench: "))
        return self._died(_how_it_ended(code, last))

    def _died(self, reason: str) -> Result:
        """Record a run whose process could not."""
        result = empty_result(self.run.spec, make_accelerator(), "failed", without_paths(reason))
        environment = result.environment.model_copy(update={"threads": self.shares.threads})
        result = result.model_copy(update={"environment": environment})
        save(self.how.results, result)
        status = read_status(self.folder)
        if status is not None:
            write_status(self.folder, status.model_copy(update={"state": "failed"}))
        return result

    def _last_words(self) -> str:
        """Last line that the process wrote."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "")

    def _result_written(self) -> int | None:
        """When the result file was last written."""
        try:
            return self.run.file.stat().st_mtime_ns
        except OSError:
            return None


def _how_it_ended(code: int, last: str) -> str:
    if code < 0:
        names = {number.value: number.name for number in signal.Signals}
        return f"its process was killed by {names.get(-code, f'signal {-code}')}"
    return f"its process ended with code {code} and no result" + (f": {last}" if last else "")


def _end(processes: list[subprocess.Popen[bytes]]) -> None:
    """Ask all to end, and kill those that do not in time; also on another Ctrl-C meanwhile."""
    deadline = time.monotonic() + GRACE_SECONDS
    try:
        _send(processes, signal.SIGTERM)
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        _send(processes, signal.SIGKILL)
        for process in processes:
            process.wait()


def _send(processes: list[subprocess.Popen[bytes]], what: signal.Signals) -> None:
    """To those that still run, with the processes that they started."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, what)


@contextlib.contextmanager
def _interrupted_by_sigterm() -> Iterator[None]:
    """SIGTERM does what Ctrl-C does."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
