"""What each of several runs at a time gets of this machine."""

import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import torch

from kdbench.engine.device import trains_on_cpu
from kdbench.errors import UserError

THREADS = "OMP_NUM_THREADS"
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Shares:
    """An equal part of the CPU for each, and the GPUs in turn."""

    jobs: int
    gpus: tuple[str, ...]
    """As CUDA_VISIBLE_DEVICES names them."""
    threads: int
    """Of each process."""
    processes: int = 1
    """Of each run."""
    variables: dict[str, str] = field(default_factory=dict)
    """Further ones of each environment."""

    @classmethod
    def among(cls, jobs: int, processes: int = 1) -> Self:
        """For a number of runs at a time; the user's OMP_NUM_THREADS holds for each process."""
        asked = THREADS in os.environ
        threads = torch.get_num_threads() if asked else max(1, cores() // (jobs * processes))
        return cls(jobs, _gpus(), threads, processes)

    @property
    def on_a_device(self) -> int:
        """Most runs that share one device."""
        return math.ceil(self.jobs / max(1, len(self.gpus) // self.processes))

    def environment(self, slot: int) -> dict[str, str]:
        """Environment of the run in one of `jobs` slots."""
        own = {THREADS: str(self.threads)}
        groups = len(self.gpus) // self.processes
        if groups > 0 and len(self.gpus) > 1:
            first = slot % groups * self.processes
            own[VISIBLE] = ",".join(self.gpus[first : first + self.processes])
        # Modules are found where this process finds them, wherever it was started.
        own["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        return os.environ | own | self.variables


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def check_gpus(processes: int) -> None:
    """Refuse more processes on this machine than it has GPUs, where it trains on them.

    Raises:
        UserError: names both numbers.
    """
    gpus = torch.cuda.device_count()
    if not trains_on_cpu() and processes > gpus:
        raise UserError(
            f"{processes} processes need a GPU each, and this machine has {gpus}; start fewer, or "
            "set ACCELERATE_USE_CPU=true to train on its CPU."
        )


def threads_are_the_users() -> bool:
    """Whether the user said how many threads a process has.

    torchrun says 1 by itself where the user said nothing; what it was started with tells which.
    """
    if THREADS not in os.environ:
        return False
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return True
    try:
        started_with = Path(f"/proc/{os.getppid()}/environ").read_bytes()
    except OSError:
        return True
    return any(entry.startswith(f"{THREADS}=".encode()) for entry in started_with.split(b"\0"))


def _gpus() -> tuple[str, ...]:
    count = torch.cuda.device_count()
    named = os.environ.get(VISIBLE)
    names = named.split(",") if named else map(str, range(count))
    return tuple(name.strip() for name in names)[:count]
