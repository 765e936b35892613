"""Soak test: many short runs in one process and two at a time.

`python tests/reliability/soak.py` trains 200 runs of one epoch in each form, and prints what grows
and what differs.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import psutil
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import METHODS
from launched import carry_out

from kdbench.launch import execution
from kdbench.launch.jobs import Followed
from kdbench.results.files import iter_results, result_path
from kdbench.results.schema import Result

SUITE = """
version = 1
extends = "digits"
description = "one epoch of two steps"
batch_size = 40
evaluation_batch_size = 40
[data.train]
per_class = 8
[data.test]
per_class = 4
[schedule]
epochs = 1
milestones = []
warmup_epochs = 0
"""
FORMS = {"one process": [], "--jobs 2": ["--jobs", "2"]}
LEAK = 0.1
"""Limit of memory growth in MiB per run; a leaked smallest network takes 0.6 MiB."""


class Sample(NamedTuple):
    """Sample of the main process after a run."""

    resident: float
    """Resident memory in MiB."""
    files: int
    """Number of open files."""
    threads: int


@dataclass(frozen=True)
class Soaked:
    """A plan, and samples of the process that executed it."""

    form: str
    methods: int
    seeds: int
    numbers: dict[str, dict[str, Any]]
    """Finished results that load, by file, without load-dependent fields."""
    samples: list[Sample]
    left: int
    """Child processes that still existed at its end."""
    seconds: float

    @property
    def runs(self) -> int:
        return self.methods * self.seeds

    def levels(self, of: str) -> list[float]:
        """Return medians over all methods for each seed, without the first, which warms up."""
        values = [getattr(sample, of) for sample in self.samples]
        starts = range(self.methods, len(values), self.methods)
        return [median(values[start : start + self.methods]) for start in starts]

    @property
    def growth(self) -> float:
        """Return the memory growth in MiB per run, from the second seed to the last."""
        levels = self.levels("resident")
        return (levels[-1] - levels[0]) / ((len(levels) - 1) * self.methods)

    def faults(self, leak: float = LEAK) -> list[str]:
        """Return the problems found."""
        files, right = self.levels("files"), len(self.numbers)
        found = {
            f"{self.runs - right} results are not there": right != self.runs,
            f"{self.left} processes are left": self.left > 0,
            f"open files went from {files[0]:.0f} to {files[-1]:.0f}": files[-1] > files[0],
            f"memory grew by {self.growth:.2f} MiB a run": self.growth > leak,
        }
        return [fault for fault, holds in found.items() if holds]


def _inside(command: list[str], folder: Path) -> None:
    """Run the command in a separate process, with a sample after each run."""
    this = psutil.Process()
    samples: list[Sample] = []

    def sampled(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            value = function(*arguments)
            if value is not None:  # `poll` has none until the run has ended
                resident = this.memory_info().rss / 2**20
                samples.append(Sample(resident, this.num_fds(), this.num_threads()))
            return value

        return call

    if "--jobs" in command:
        Followed.poll = sampled(Followed.poll)  # type: ignore[method-assign]
    else:
        execution.write_result = sampled(execution.write_result)

    def keep() -> None:
        left = len(this.children(recursive=True))
        Path("samples.json").write_text(json.dumps({"samples": samples, "left": left}))

    carry_out(command, folder, keep)


def soak(form: str, methods: list[str], seeds: int, folder: Path) -> Soaked:
    """Execute the plan in one of the forms."""
    folder.mkdir(parents=True)
    (folder / "soak.toml").write_text(SUITE)
    plan = ["run", "--suite", "soak.toml", "--methods", ",".join(methods), "--seeds", str(seeds)]
    started = time.monotonic()
    process = multiprocessing.get_context("spawn").Process(
        target=_inside, args=([*plan, *FORMS[form]], folder)
    )
    process.start()
    process.join()
    seconds = time.monotonic() - started
    if process.exitcode != 0:
        log = (folder / "log").read_text()[-2000:]
        raise AssertionError(f"{form} ended with {process.exitcode}: {log}")
    made = json.loads((folder / "samples.json").read_text())
    samples = [Sample(*sample) for sample in made["samples"]]
    numbers = _numbers(folder / "results")
    return Soaked(form, len(methods), seeds, numbers, samples, made["left"], seconds)


def _numbers(results: Path) -> dict[str, dict[str, Any]]:
    load_or_commits = {"cost": True, "environment": {"commit", "dirty"}}  # someone may work on it
    found = {}
    for result in iter_results(results):
        if isinstance(result, Result) and result.status == "finished":
            file = result_path(results, result.identity).relative_to(results)
            found[str(file)] = result.model_dump(exclude=load_or_commits)
    return found


def differing(one: Soaked, other: Soaked) -> list[str]:
    """Return the runs whose numbers are not bit-identical."""
    names = one.numbers.keys() | other.numbers.keys()
    return sorted(name for name in names if one.numbers.get(name) != other.numbers.get(name))


def row(soaked: Soaked) -> dict[str, Any]:
    """Return a row of the table."""
    cells: dict[str, Any] = {"form": soaked.form, "runs": soaked.runs}
    cells["right results"] = len(soaked.numbers)
    for of, title in (("resident", "MiB"), ("files", "open files"), ("threads", "threads")):
        levels = soaked.levels(of)
        cells[title] = f"{levels[0]:.0f} -> {levels[-1]:.0f} (at most {max(levels):.0f})"
    cells["MiB a run"] = f"{soaked.growth:+.3f}"
    cells["minutes"] = f"{soaked.seconds / 60:.1f}"
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=20, help="of each method")
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # the last bits depend on it, and jobs share the cores
    with tempfile.TemporaryDirectory() as place:
        done = [soak(form, METHODS, asked.seeds, Path(place) / form) for form in FORMS]
    print(tabulate([row(soaked) for soaked in done], headers="keys", tablefmt="github"))
    faults = [f"{soaked.form}: {fault}" for soaked in done for fault in soaked.faults()]
    faults += [f"{name} differs between the forms" for name in differing(*done)]
    print("\n" + "\n".join(faults or ["Nothing grew, and all numbers are equal in both forms."]))
    sys.exit(bool(faults))


if __name__ == "__main__":
    from reliability import soak as named  # the process finds what it runs by this name

    named.main()
