"""Slurm: what is asked of it, and what it knows. submitit writes the batch script."""

import contextlib
import importlib.util
import io
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kdbench.errors import UserError, unknown_name_error

REQUEUES = 20
"""Times that a run may run out of time before it is left to the user."""
SIGNAL_SECONDS = 90
"""Between the signal and the end of the time: for a step, a checkpoint and the way to the queue."""
EARLY_SECONDS = 30
"""By which Slurm may send it earlier still."""
START_SECONDS = 30
"""Until a run trains."""
ANSWER_SECONDS = 20
"""A controller that takes longer is as good as none."""
QUEUE_SECONDS = 5
"""The same, where the runs' own files say most."""
LONGEST_MINUTES = 24 * 60
"""Asked for where neither the user nor the partition sets a limit."""

TIME = re.compile(
    r"(?:(?P<days>\d+)-(?P<day_hours>\d+)(?::(?P<day_minutes>\d+)(?::(?P<day_seconds>\d+))?)?"
    r"|(?:(?P<hours>\d+):(?=\d+:))?(?P<minutes>\d+)(?::(?P<seconds>\d+))?)"
)
MEMORY = re.compile(r"\d+[KMGT]?", re.IGNORECASE)


@dataclass(frozen=True)
class SlurmRequest:
    """What each run shall have."""

    partition: str | None = None
    gpus: int = 0
    cpus: int = 1
    time: str | None = None
    memory: str | None = None
    constraint: str | None = None
    parallel: int | None = None
    """Runs at a time."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UserError: names the option.
        """
        if self.gpus not in (0, 1):
            raise UserError(f"--gpus must be 0 or 1, not {self.gpus}: a run is one process.")
        for option, value in (("--cpus", self.cpus), ("--max-parallel", self.parallel)):
            if value is not None and value < 1:
                raise UserError(f"{option} must be at least 1, not {value}.")
        if self.memory is not None and not MEMORY.fullmatch(self.memory):
            raise UserError(f"--mem '{self.memory}' is no amount of memory; write it like 16G.")
        if self.time is not None and minutes(self.time) < _least_minutes():
            raise UserError(
                f"--time {self.time} leaves a run no time to train: it is told to stop up to "
                f"{SIGNAL_SECONDS + EARLY_SECONDS} seconds before; ask for at least "
                f"{_least_minutes()} minutes."
            )

    def sbatch(self, runs: int, limit: int | None) -> dict[str, object]:
        """Parameters of sbatch, as submitit names them; `limit` is the partition's, in minutes.

        Raises:
            UserError: the partition does not give that much time.
        """
        asked = LONGEST_MINUTES if limit is None else limit
        if self.time is not None:
            asked = minutes(self.time)
            if limit is not None and asked > limit:
                raise UserError(
                    f"--time {self.time} is more than the {limit} minutes that the partition "
                    "allows; a run that is out of time goes on in the next job, so ask for less."
                )
        given: dict[str, object] = {
            "job_name": "kdbench",
            "partition": self.partition,
            "time": asked,
            "cpus_per_task": self.cpus,
            "gpus_per_node": self.gpus or None,
            "mem": self.memory,
            "constraint": self.constraint,
            "array_parallelism": min(runs, self.parallel or runs),
        }
        return {name: value for name, value in given.items() if value is not None}


def _least_minutes() -> int:
    return math.ceil((SIGNAL_SECONDS + EARLY_SECONDS + START_SECONDS) / 60)


def minutes(time: str) -> int:
    """Of a time as Slurm writes it, rounded up.

    Raises:
        UserError: it is none.
    """
    found = TIME.fullmatch(time)
    total = 0.0
    if found:
        part = {name: int(value or 0) for name, value in found.groupdict().items()}
        hours = 24 * part["days"] + part["day_hours"] + part["hours"]
        seconds = part["day_seconds"] + part["seconds"]
        total = 60 * hours + part["day_minutes"] + part["minutes"] + seconds / 60
    if not total:
        raise UserError(
            f"--time '{time}' is no time; write minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS."
        )
    return -(-round(60 * total) // 60)


def check_partition(name: str | None) -> int | None:
    """Time limit in minutes of a partition, or of the default one; None where there is none.

    Raises:
        UserError: no Slurm, one that does not answer, or no such partition.
    """
    if shutil.which("sbatch") is None:
        raise UserError(
            "There is no Slurm here (no sbatch): give the command on a node that can submit jobs, "
            "or use --cluster local."
        )
    if importlib.util.find_spec("submitit") is None:
        raise UserError("--cluster slurm needs submitit: pip install 'kdbench[slurm]'.")
    try:
        lines = _ask("sinfo", "--noheader", "--format=%P|%l").splitlines()
    except SlurmError as error:
        raise UserError(f"Slurm does not answer ({error}); try again when it does.") from error
    limits = dict(line.split("|") for line in lines)
    if name is None:
        limit = next((limit for key, limit in limits.items() if key.endswith("*")), None)
        if limit is None:
            raise UserError(
                f"Slurm has no default partition; --partition is one of {_list(limits)}."
            )
    else:
        named = {key.removesuffix("*"): limit for key, limit in limits.items()}
        if name not in named:
            raise unknown_name_error("partition", name, named)
        limit = named[name]
    return None if limit in ("infinite", "n/a") else minutes(limit)


def send(folder: Path, runs: int, parameters: dict[str, object]) -> str:
    """Submit the orders of a folder as an array; its job number.

    Raises:
        UserError: Slurm refuses it.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.slurm.slurm import SlurmExecutor

    from kdbench.launch.submission import order_file
    from kdbench.launch.task import Task

    folder = folder.resolve()
    executor = SlurmExecutor(folder, max_num_timeout=REQUEUES)
    executor.update_parameters(
        **parameters,
        signal_delay_s=SIGNAL_SECONDS,
        srun_args=[f"--cpus-per-task={parameters['cpus_per_task']}"],
        setup=_setup(parameters),
        teardown=_teardown(folder),
        additional_parameters={"requeue": True},
    )
    tasks = [Task(order_file(folder, task)) for task in range(runs)]
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # submitit also prints what it raises
            jobs = executor.submit_array(tasks)
    except (FailedJobError, FailedSubmissionError) as error:
        last = str(error).strip().split("\n")[-1].removeprefix("sbatch: ").removeprefix("error: ")
        raise UserError(f"Slurm refused the runs: {last.rstrip('.')}.") from error
    return jobs[0].job_id.partition("_")[0]


def _setup(parameters: dict[str, object]) -> list[str]:
    """Modules are found where this process finds them; a run has the threads that it asked for."""
    path = os.pathsep.join(path for path in sys.path if path)
    threads = os.environ.get("OMP_NUM_THREADS", str(parameters["cpus_per_task"]))
    return [
        f"export PYTHONPATH={shlex.quote(path)}",
        "export PYTHONSAFEPATH=1",
        f"export OMP_NUM_THREADS={shlex.quote(threads)}",
    ]


def _teardown(folder: Path) -> list[str]:
    """Where the process was killed, something else must say so."""
    place, python = shlex.quote(str(folder)), shlex.quote(sys.executable)
    died = f"{python} -m kdbench.launch.died {place}/order-${{SLURM_ARRAY_TASK_ID:-0}}.json"
    return [
        "code=$?",
        "job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}",
        f"[ $code -eq 0 ] || {died} $code {place}/${{job:-$SLURM_JOB_ID}}_0_log.err",
        "exit $code",
    ]


def queue() -> dict[str, str] | None:
    """State of each job of this user that is not over; None where Slurm does not say."""
    try:
        text = _ask(
            "squeue", "--me", "--noheader", "--array", "--format=%i|%T|%r", seconds=QUEUE_SECONDS
        )
    except SlurmError:
        return None
    jobs = {}
    for line in text.splitlines():
        job, state, reason = line.split("|", 2)
        jobs[job] = state if reason == "None" else f"{state} ({reason})"
    return jobs


def cancel(jobs: Sequence[str]) -> None:
    """Take jobs out of the queue, or end them.

    Raises:
        UserError: Slurm does not do it.
    """
    try:
        _ask("scancel", *jobs)
    except SlurmError as error:
        raise UserError(f"Slurm did not cancel the jobs ({error}); try again.") from error


class SlurmError(Exception):
    """Slurm is not there, or does not answer, or refuses."""


def _ask(*command: str, seconds: float | None = None) -> str:
    seconds = seconds or ANSWER_SECONDS
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=True)
    except FileNotFoundError as error:
        raise SlurmError(f"no {command[0]} here") from error
    except subprocess.TimeoutExpired as error:
        raise SlurmError(f"{command[0]} takes more than {seconds} s") from error
    except subprocess.CalledProcessError as error:
        last = error.stderr.strip().split("\n")[-1]
        raise SlurmError(last or f"{command[0]} ended with {error.returncode}") from error
    return done.stdout


def _list(names: dict[str, str]) -> str:
    return ", ".join(names)
