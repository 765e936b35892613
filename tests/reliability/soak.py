"""Trains many short runs in one process and two at a time; prints what grows and what differs."""

import json
import multiprocessing
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

from conftest import METHODS, TINY
from launched import carry_out, numbers_in

from kdbench.launch import execution
from kdbench.launch.jobs import Followed
from kdbench.results.files import read_result
from kdbench.results.schema import Result

SUITE = TINY.replace("per_class = 16", "per_class = 8")
PLAN = ["run", "--suite", "soak.toml", "--epochs", "1"]
"""Runs of one epoch of two steps."""

FORMS = {"one process": [], "--jobs 2": ["--jobs", "2"]}
LEAK = 0.1
"""Limit of memory growth in MiB per run; a leaked smallest network takes 0.6 MiB."""


class Sample(NamedTuple):
    """Resident memory in MiB, and numbers of open files and threads, of the main process."""

    resident: float
    files: int
    threads: int


@dataclass(frozen=True)
class Soaked:
    """A plan, and samples of the process that executed it, one after each run."""

    form: str
    runs: int
    methods: int
    numbers: dict[str, dict[str, Any]]
    """Finished results that load, by file, without load-dependent fields."""
    samples: list[Sample]
    left: int
    """Child processes that still existed at its end."""
    seconds: float

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
    folder.mkdir(parents=True)
    (folder / "soak.toml").write_text(SUITE)
    command = [*PLAN, "--methods", ",".join(methods), "--seeds", str(seeds), *FORMS[form]]
    started = time.monotonic()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_inside, args=(command, folder))
    process.start()
    process.join()
    seconds = time.monotonic() - started
    assert process.exitcode == 0, (folder / "log").read_text()[-2000:]
    state = json.loads((folder / "samples.json").read_text())
    samples = [Sample(*sample) for sample in state["samples"]]
    found = {
        str(file.relative_to(folder)): numbers_in(file)
        for file in folder.glob("results/*/*/*/seed*.json")
        if isinstance(read_result(file), Result)
    }
    numbers = {file: made for file, made in found.items() if made["status"] == "finished"}
    runs = len(methods) * seeds
    return Soaked(form, runs, len(methods), numbers, samples, state["left"], seconds)


def differing(one: Soaked, other: Soaked) -> list[str]:
    """Return the runs whose numbers are not bit-identical."""
    names = one.numbers.keys() | other.numbers.keys()
    return sorted(name for name in names if one.numbers.get(name) != other.numbers.get(name))


def row(soaked: Soaked) -> dict[str, Any]:
    cells = {"form": soaked.form, "runs": soaked.runs, "right results": len(soaked.numbers)}
    for of, title in (("resident", "MiB"), ("files", "open files"), ("threads", "threads")):
        levels = soaked.levels(of)
        cells[title] = f"{levels[0]:.0f} -> {levels[-1]:.0f} (at most {max(levels):.0f})"
    cells["MiB a run"] = f"{soaked.growth:+.3f}"
    cells["minutes"] = f"{soaked.seconds / 60:.1f}"
    return cells


def main() -> None:
    with tempfile.TemporaryDirectory() as place:
        done = [soak(form, METHODS, 20, Path(place) / form) for form in FORMS]
    print(tabulate([row(soaked) for soaked in done], headers="keys", tablefmt="github"))
    faults = [f"{soaked.form}: {fault}" for soaked in done for fault in soaked.faults()]
    faults += [f"{name} differs between the forms" for name in differing(*done)]
    print("\n" + "\n".join(faults or ["Nothing grew, and all numbers are equal in both forms."]))
    sys.exit(bool(faults))


if __name__ == "__main__":
    from reliability import soak as named  # the process finds what it runs by this name

    named.main()
