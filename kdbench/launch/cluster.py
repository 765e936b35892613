"""Sends runs to where they wait for their turn."""

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

import torch

from kdbench.data import is_cached, locate, open_images
from kdbench.errors import UserError
from kdbench.launch import slurm
from kdbench.launch.dispatch import prepare, record
from kdbench.launch.execution import Execution, run_folder
from kdbench.launch.plan import PlannedRun
from kdbench.launch.slurm import SlurmRequest
from kdbench.launch.submission import Submission, locked
from kdbench.launch.watch import watch
from kdbench.results.files import check_writable

Cluster = Literal["slurm", "local"]


@dataclass(frozen=True)
class Sent:
    """What became of a plan."""

    runs: int
    under_way: int
    """Left out: an earlier submission has them."""
    folder: Path | None = None
    job: str = ""


def submit(
    plan: Sequence[PlannedRun], how: Execution, cluster: Cluster, request: SlurmRequest
) -> Sent:
    """Send what is to run and is not under way already.

    Raises:
        UserError: no such cluster or partition, data that cannot be read, a folder that cannot be
            written.
    """
    limit = slurm.check_partition(request.partition) if cluster == "slurm" else None
    check_writable(how.results)
    check_writable(how.runs)
    todo = [run for run in plan if run.state == "to run"]
    folders = [run_folder(how.runs, run.spec) for run in todo]
    busy = {run.folder for run in watch(how.runs, folders) if run.under_way}
    specs = [run.spec for run, folder in zip(todo, folders, strict=True) if folder not in busy]
    if not specs:
        return Sent(0, len(busy))
    parameters = request.sbatch(len(specs), limit) if cluster == "slurm" else {}
    source = locate(specs[0].suite.data, how.data_dir, is_cached)
    open_images(source, torch.device("cpu"), workers=0)  # the runs then find them in the cache
    folder = prepare(specs, how)
    if cluster == "slurm":
        try:
            job = slurm.send(folder, len(specs), parameters)
        except UserError:
            shutil.rmtree(folder)
            raise
        record(folder, Submission(cluster="slurm", job=job, runs=len(specs)))
    else:
        job = ""
        lock = locked(folder)
        assert lock is not None  # a new folder
        with lock:  # before anybody can look for its supervisor
            record(folder, Submission(cluster="local", runs=len(specs)))
            _start_supervisor(folder, request.parallel or 1, lock)
    return Sent(len(specs), len(busy), folder, job)


def _start_supervisor(folder: Path, parallel: int, lock: IO[bytes]) -> None:
    """It lives on when this process, its terminal and its session have ended."""
    command = [sys.executable, "-P", "-m", "kdbench.launch.supervisor", str(folder), str(parallel)]
    with (folder / "supervisor.log").open("wb") as log:
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
            pass_fds=[lock.fileno()],  # it is held as long as the supervisor lives
        )
