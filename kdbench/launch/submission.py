"""Runs sent to where they wait for their turn, and what is written down about them.

runs/submitted/<name>/: submission.json, the order of each run, and the logs of whoever runs them.
"""

import fcntl
from pathlib import Path
from typing import IO, Literal

from pydantic import ValidationError

from kdbench.results.schema import Record

FOLDER = "submitted"
FILE = "submission.json"


class Submission(Record):
    """What is known of one after it was sent."""

    cluster: Literal["slurm", "local"]
    job: str = ""
    """Slurm's number."""
    runs: int = 0

    def job_of(self, task: int) -> str:
        """Slurm's name of a run's job: submitit sends one alone as no array."""
        return f"{self.job}_{task}" if self.runs > 1 else self.job


def read_submission(folder: Path) -> Submission | None:
    """None where there is none that can be read."""
    try:
        return Submission.model_validate_json((folder / FILE).read_bytes())
    except (OSError, ValidationError):
        return None


def order_file(folder: Path, task: int) -> Path:
    return folder / f"order-{task}.json"


def cancel_file(folder: Path, task: int) -> Path:
    """Where it exists, the run is not wanted any more."""
    return folder / f"cancel-{task}"


def begun_file(folder: Path, task: int) -> Path:
    """Where it exists, a run that was to begin anew has done so."""
    return folder / f"begun-{task}"


def has_supervisor(folder: Path) -> bool:
    """Whether one lives, on whatever machine shares the file system and its locks."""
    lock = locked(folder)
    if lock is not None:
        lock.close()
    return lock is None


def locked(folder: Path) -> IO[bytes] | None:
    """The supervisor's lock, which ends with it; None where one lives and holds it."""
    lock = (folder / "lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        return None
    return lock
