"""Runs that are killed again and again, at moments drawn at random, beside runs that never were.

`python tests/reliability/kills.py` prints a table of what was done and lost. Moments are counted,
not timed: every step, evaluated batch and stage of writing a file is one, however short it is, and
each kind of moment is as likely as any other. Of processes that train a run together, one comes to
the moment and all are killed. A checkpoint is written as often as can be, after each step and after
every other one of two processes.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import METHODS, TINY, finish
from launched import carry_out

from kdbench import atomic
from kdbench.engine import checkpoint, evaluate
from kdbench.engine import run as run_module
from kdbench.engine.step import TrainingStep
from kdbench.launch.torchrun import torchrun
from kdbench.results import files
from kdbench.results.files import read_result
from kdbench.results.schema import Result

COMPILED = ["--compile", "inductor"]
TOGETHER = ["--num-processes", "2"]
FORMS: dict[str, tuple[list[str], int]] = {
    "plain": ([], 1),
    "compiled": (COMPILED, 1),
    "together": (TOGETHER, 2),
    "both": ([*TOGETHER, *COMPILED], 2),
}
"""Options of the command, and the number of processes that train the run."""

Numbers = tuple[dict[str, Any], dict[str, Any]]
"""A result without load-dependent fields, and the final training state."""


@dataclass
class Harm:
    """Kills of the runs of one command, and their outcome."""

    command: str
    kills: int = 0
    moments: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    equal: int = 0
    damaged: int = 0
    """Number of result and checkpoint files that a kill left incomplete."""


Moment = tuple[int, str, int]
"""Process, kind and number (from 1) of a moment."""

RANK = int(os.environ.get("RANK", "0"))
"""Rank of this process within the run."""


class Moments:
    """Counts moments, and kills the process at the fatal one."""

    def __init__(self, fatal: Moment | None):
        self.fatal = fatal
        self.seen = Counter[str]()

    def __call__(self, kind: str) -> None:
        self.seen[kind] += 1
        if (RANK, kind, self.seen[kind]) == self.fatal:
            Path("moment").write_text(kind)
            if "RANK" in os.environ:
                for process in psutil.Process(os.getppid()).children():
                    if process.pid != os.getpid():
                        process.kill()
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        step, count, writing = TrainingStep.__call__, evaluate._count, atomic.atomic_write

        def stepped(*arguments: Any) -> Any:
            self("before a step")
            values = step(*arguments)
            self("after a step")
            return values

        def counted(*arguments: Any) -> Any:
            self("in an evaluation")
            return count(*arguments)

        def written_as(kind: str) -> Any:
            @contextlib.contextmanager
            def written(file: Path, durable: bool = True) -> Iterator[Any]:
                self(f"before writing {kind}")
                with writing(file, durable) as stream:
                    yield Halting(stream, lambda: self(f"amid writing {kind}"))
                    self(f"before {kind} gets its name")
                self(f"after writing {kind}")

            return written

        TrainingStep.__call__ = stepped  # type: ignore[method-assign]
        evaluate._count = counted
        checkpoint.atomic_write = written_as("a checkpoint")  # type: ignore[attr-defined]
        files.atomic_write = written_as("a result")  # type: ignore[attr-defined]


class Halting:
    """A stream with a moment in the middle of each write."""

    def __init__(self, stream: Any, moment: Callable[[], None]):
        self.stream, self.moment = stream, moment

    def write(self, content: Any) -> None:
        view = memoryview(content)
        self.stream.write(view[: len(view) // 2])
        self.stream.flush()
        self.moment()
        self.stream.write(view[len(view) // 2 :])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def attempt(command: list[str], folder: Path, fatal: Moment | None) -> None:
    """Run in a separate process."""
    torch.set_num_threads(1)
    run_module.SAVE_SECONDS = -1
    moments = Moments(fatal)
    moments.install()
    counted = f"moments{RANK}"
    carry_out(command, folder, lambda: Path(counted).write_text(json.dumps(moments.seen)))


def run(command: list[str], folder: Path, processes: int, fatal: Moment | None = None) -> bool:
    """Return True if the command ended, and False if it was killed."""
    (folder / "moment").unlink(missing_ok=True)
    if processes == 1:
        multiprocessing.set_forkserver_preload(["reliability.kills"])
        context = multiprocessing.get_context("forkserver")
        process = context.Process(target=attempt, args=(command, folder, fatal))
        process.start()
        process.join()
        code = process.exitcode
    else:
        what = json.dumps([command, str(folder), fatal])
        launcher = torchrun(processes, "reliability.kills", "--attempt", what)
        code, _, _ = finish(launcher, seconds=600, PYTHONPATH=os.pathsep.join(sys.path))
    if code != 0 and not (folder / "moment").exists():
        raise AssertionError(f"{command} ended with {code}: {folder / 'log'}")
    return code == 0


def numbers(folder: Path) -> Numbers:
    (file,) = folder.glob("results/*/*/*/seed*.json")
    result = json.loads(file.read_text())
    assert result["status"] == "finished", result["reason"]
    del result["cost"]
    del result["environment"]["commit"], result["environment"]["dirty"]  # someone may work on it
    last = max(folder.glob("runs/*/*/*/*/checkpoint-*.pt"))
    content = checkpoint._read(last, torch.device("cpu"))
    assert content is not None
    return result, {"method": content["method"], "optimizers": content["optimizers"]}


def differing(ours: Numbers, theirs: Numbers) -> list[str]:
    """Return the keys of the result and the parts of the state that are not bit-identical."""
    results = [key for key in ours[0] | theirs[0] if ours[0].get(key) != theirs[0].get(key)]
    return results + [part for part in theirs[1] if not _same(ours[1][part], theirs[1][part])]


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(_same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    return bool(ours == theirs)


def half_files(folder: Path) -> int:
    """Return incomplete files that have their final name."""
    results = [read_result(file) for file in folder.glob("results/*/*/*/seed*.json")]
    checkpoints = folder.glob("runs/*/*/*/*/checkpoint-*.pt")
    whole = [checkpoint._read(file, torch.device("cpu")) is not None for file in checkpoints]
    return whole.count(False) + sum(not isinstance(result, Result) for result in results)


def harm(command: list[str], kills: int, place: Path, draw: random.Random, processes: int) -> Harm:
    """Kill runs of a command repeatedly, resume them until they end, and compare the results."""
    done = Harm(" ".join(command))
    clean, victim = place / "clean", place / "victim"
    for folder in (clean, victim):
        folder.mkdir(parents=True)
        (folder / "tiny.toml").write_text(TINY)
    assert run(command, clean, processes)
    moments = [json.loads((clean / f"moments{rank}").read_text()) for rank in range(processes)]
    expected = numbers(clean)
    while done.kills < kills:
        for folder in ("results", "runs"):
            shutil.rmtree(victim / folder, ignore_errors=True)
        for attempts in itertools.count(1):
            assert attempts < 100, "it does not get on"
            fatal = drawn(moments, draw) if done.kills < kills else None
            ended = run(command, victim, processes, fatal)
            if ended:
                break
            done.kills += 1
            done.moments[(victim / "moment").read_text()] += 1
            done.damaged += half_files(victim)
        done.finished += 1
        differ = differing(numbers(victim), expected)
        done.equal += not differ
        if differ:
            print(f"{done.command}: another {', '.join(differ)}", file=sys.stderr, flush=True)
    return done


def drawn(moments: list[dict[str, int]], draw: random.Random) -> Moment:
    rank = draw.randrange(len(moments))
    kind = draw.choice(sorted(moments[rank]))
    return rank, kind, draw.randint(1, moments[rank][kind])


def campaign(kills: Sequence[int], methods: list[str], seed: int) -> Iterator[Harm]:
    """Kill each method the given number of times, for each of FORMS."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as place:
        for (form, (options, processes)), count in zip(FORMS.items(), kills, strict=True):
            for method in methods if count else []:
                command = ["run", "--suite", "tiny.toml", "--methods", method, *options]
                yield harm(command, count, Path(place) / form / method, draw, processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for form, default in zip(FORMS, (4, 1, 2, 1), strict=True):
        parser.add_argument(f"--{form}", type=int, default=default, help="kills of each method")
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attempt", type=json.loads, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.attempt:  # a process that torchrun started
        command, folder, fatal = asked.attempt
        return attempt(command, Path(folder), fatal and tuple(fatal))
    kills = [getattr(asked, form) for form in FORMS]
    rows, moments = [], Counter[str]()
    for done in campaign(kills, asked.methods.split(","), asked.seed):
        print(done, file=sys.stderr, flush=True)
        moments += done.moments
        rows.append(
            {
                "command": f"`kdbench {done.command}`",
                "kills": done.kills,
                "runs": done.finished,
                "equal to one never killed": done.equal,
                "half files": done.damaged,
            }
        )
    print(tabulate(rows, headers="keys", tablefmt="github"))
    print()
    print(tabulate(moments.most_common(), headers=["moment", "kills"], tablefmt="github"))
    unequal = any(row["runs"] != row["equal to one never killed"] for row in rows)
    sys.exit(unequal or any(row["half files"] for row in rows))


if __name__ == "__main__":
    from reliability import kills  # processes find what they run by this name

    kills.main()
