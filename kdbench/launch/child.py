"""A run in a process that this one started, and what to make of its end."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from kdbench.atomic import atomic_write, os_errors_as_user_errors
from kdbench.errors import UserError
from kdbench.launch.claim import TakenError, made_meanwhile
from kdbench.launch.death import OURS, how_it_ended, last_words, record_death
from kdbench.launch.order import WorkOrder
from kdbench.launch.shares import Shares
from kdbench.launch.status import RunStatus, read_status
from kdbench.launch.torchrun import torchrun
from kdbench.results.files import check_writable, read_result, result_path
from kdbench.results.schema import Result
from kdbench.signals import SIGNALS, SignalledError, handled

WORKER = "kdbench.launch.worker"

GRACE_SECONDS = 30.0
"""Between asking a process to end and killing it: for its step and its checkpoint."""


class Child:
    """A worker with its order."""

    def __init__(self, order: WorkOrder, shares: Shares, slot: int):
        """Start it.

        Raises:
            UnwritableError: the run's folder cannot be written.
            UserError: its method changed.
        """
        self.order, self.spec, self.shares = order, order.spec(), shares
        self.log = order.folder / f"worker-{os.getpid()}.log"  # another command has its own
        self.file = result_path(order.how.results, self.spec.identity())
        self._asked = False
        check_writable(order.folder)
        self._result_before = self._result_written()
        command = self._command()
        with os_errors_as_user_errors(f"write '{self.log}'"):
            log = self.log.open("wb")
        with log:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=shares.environment(slot),
                process_group=0,  # a terminal sends Ctrl-C to this process alone
            )
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError), self.process.stdin as stream:
            stream.write(order.model_dump_json().encode())

    @property
    def ended(self) -> bool:
        return self.process.poll() is not None

    def status(self) -> RunStatus | None:
        """The run's status, once this process has written it."""
        status = read_status(self.order.folder)
        return status if status is not None and status.pid == self.process.pid else None

    def ask_to_stop(self) -> None:
        """Once: alone it ends after its step, several processes at once.

        Those that it started serve it until then.
        """
        if not self.ended and not self._asked:
            self._asked = True
            self.process.terminate()

    def kill(self) -> None:
        """With the processes that it started."""
        if not self.ended:
            os.killpg(self.process.pid, signal.SIGKILL)

    def outcome(self) -> Result:
        """The result once the process has ended; a failed one where it wrote none.

        Raises:
            TakenError: another command has the run.
            UserError: the process met one.
        """
        # A process may fail after its result is written, while it is taken down.
        if self._result_written() != self._result_before:
            found = read_result(self.file)
            if isinstance(found, Result):
                return found
        made = made_meanwhile(self.spec, self.order.how)
        if made is not None:  # by another command, before this process began
            return made
        code, last = self.process.returncode, last_words(self.log)
        if code == TakenError.exit_code:
            raise TakenError(self.spec.label)
        if code == 2 and last.startswith(OURS):
            raise UserError(last.removeprefix(OURS))
        reason = how_it_ended(code, self.log)
        return record_death(self.order, self.spec, reason, self.shares.threads)

    def _command(self) -> list[str]:
        """The order goes to the input, or where several processes need it, into a file."""
        processes = self.order.how.processes
        if processes == 1:
            return [sys.executable, "-u", "-P", "-m", WORKER]
        file = self.order.folder / f"order-{os.getpid()}.json"
        with atomic_write(file, durable=False) as stream:
            stream.write(self.order.model_dump_json().encode())
        return torchrun(processes, WORKER, str(file))

    def _result_written(self) -> int | None:
        """When the result file was last written."""
        try:
            return self.file.stat().st_mtime_ns
        except OSError:
            return None


def end_all(children: Sequence[Child]) -> None:
    """Ask all to end, and kill those that do not in time; also on another Ctrl-C meanwhile."""
    deadline = time.monotonic() + GRACE_SECONDS
    try:
        for child in children:
            child.ask_to_stop()
        for child in children:
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, deadline - time.monotonic()))
    finally:
        for child in children:
            child.kill()
            child.process.wait()


def interrupted_by_signals() -> contextlib.AbstractContextManager[None]:
    """All signals that ask a run to end do what Ctrl-C does."""

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        raise SignalledError(number)

    return handled(SIGNALS, interrupt)
