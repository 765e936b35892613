"""What each of several runs at a time gets of this machine."""

import math
import os
import sys
from dataclasses import dataclass
from typing import Self

import torch

THREADS = "OMP_NUM_THREADS"
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class Shares:
    """An equal part of the CPU for each, and the GPUs in turn."""

    jobs: int
    gpus: tuple[str, ...]
    """As CUDA_VISIBLE_DEVICES names them."""
    threads: int

    @classmethod
    def among(cls, jobs: int) -> Self:
        """For a number of runs at a time; the user's OMP_NUM_THREADS holds for each of them."""
        asked = THREADS in os.environ
        threads = torch.get_num_threads() if asked else max(1, cores() // jobs)
        return cls(jobs, _gpus(), threads)

    @property
    def on_a_device(self) -> int:
        """Most runs that share one device."""
        return math.ceil(self.jobs / max(1, len(self.gpus)))

    def environment(self, slot: int) -> dict[str, str]:
        """Environment of the run in one of `jobs` slots."""
        own = {THREADS: str(self.threads)}
        if len(self.gpus) > 1:
            own[VISIBLE] = self.gpus[slot % len(self.gpus)]
        # Modules are found where this process finds them, wherever it was started.
        own["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        return os.environ | own


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _gpus() -> tuple[str, ...]:
    count = torch.cuda.device_count()
    named = os.environ.get(VISIBLE)
    names = named.split(",") if named else map(str, range(count))
    return tuple(name.strip() for name in names)[:count]
