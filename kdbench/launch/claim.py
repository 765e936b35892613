"""A run belongs to one process at a time: a lock in its folder, which the owner's end releases.

So several commands share a plan: each takes what no other has, and nothing is run twice.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from kdbench.atomic import exists, os_errors_as_user_errors, remove_temp_files
from kdbench.engine.spec import RunSpec
from kdbench.errors import UnwritableError, UserError
from kdbench.launch.death import record_unwritable
from kdbench.launch.execution import ALONE, Execution, run_folder
from kdbench.launch.plan import PlannedRun
from kdbench.launch.ranks import Ranks
from kdbench.results.files import read_result, result_path
from kdbench.results.schema import Result

FILE = "lock"
POLL_SECONDS = 1.0
PROBE_SECONDS = 0.1
"""For which another command that only looks whether a run is free may have its lock."""
WAITING = "The runs that are left are being trained by another kdbench; waiting for them."


class TakenError(UserError):
    """Another process has the run."""

    exit_code = 75  # EX_TEMPFAIL: it may be had later

    def __init__(self, label: str):
        super().__init__(f"{label} is being trained by another kdbench; wait until it is done.")


@contextlib.contextmanager
def claimed(
    spec: RunSpec, how: Execution, ranks: Ranks = ALONE, wait: bool = False
) -> Iterator[Result | None]:
    """The run is this process's inside; gives the result that another made since the plan.

    The main process of `ranks` has it for all.

    Raises:
        TakenError: another process has it, and this one is not to wait.
        UnwritableError: its folder cannot be written.
    """
    folder = run_folder(how.runs, spec)
    patience = -1 if wait else PROBE_SECONDS
    with _lock(folder, spec.label, patience) if ranks.is_main else contextlib.nullcontext():
        made = None
        if ranks.is_main:
            file = result_path(how.results, spec.identity())
            remove_temp_files(folder)
            remove_temp_files(file.parent, file.name)
            made = made_meanwhile(spec, how)
        told, *_ = ranks.exchange(f"made/{spec.label}", made.model_dump_json() if made else "")
        yield Result.model_validate_json(told) if told else None


def each_claimed(
    todo: list[PlannedRun], how: Execution, ranks: Ranks, on_wait: Callable[[str], None]
) -> Generator[tuple[PlannedRun, Result | None]]:
    """Run after run, each this process's until the next is asked for; those of others last.

    A run whose folder cannot be written has failed.

    Raises:
        TakenError: several processes train together, and another has one of their runs.
        UnwritableError: the same, and the main one cannot write.
    """
    waiting, taken = deque(todo), 0
    while waiting:
        run = waiting.popleft()
        try:
            with claimed(run.spec, how, ranks) as made:
                taken = 0
                yield run, made
        except TakenError:
            if ranks.count > 1:
                raise
            waiting.append(run)
            taken += 1
            if taken >= len(waiting):
                on_wait(WAITING)
                time.sleep(POLL_SECONDS)
        except UnwritableError as error:
            if ranks.count > 1:
                raise
            yield run, record_unwritable(run.spec, how, error)


def is_claimed(folder: Path) -> bool:
    """Whether some process has the run whose folder this is."""
    if not exists(folder / FILE):
        return False
    try:
        with _lock(folder, "", 0):
            return False
    except TakenError:
        return True
    except UnwritableError:  # whoever takes it will say so
        return False


def made_meanwhile(spec: RunSpec, how: Execution) -> Result | None:
    """The result of this very run, where it was written after the plan was made."""
    file = result_path(how.results, spec.identity())
    try:
        is_new = file.stat().st_mtime > how.since
    except OSError:
        return None
    found = read_result(file) if is_new else None
    if not isinstance(found, Result) or found.fingerprint != spec.fingerprint():
        return None
    return None if found.status == "failed" else found


@contextlib.contextmanager
def _lock(folder: Path, label: str, patience: float) -> Iterator[None]:
    """`patience` is in seconds; without end where it is negative."""
    lock = FileLock(folder / FILE)
    with os_errors_as_user_errors(f"write to '{folder}'"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            interval = PROBE_SECONDS / 10 if patience >= 0 else POLL_SECONDS
            lock.acquire(timeout=patience, poll_interval=interval)
        except Timeout:
            raise TakenError(label) from None
    try:
        yield
    finally:
        lock.release()
