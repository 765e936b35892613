"""Kills runs again and again at random moments, and compares them with runs that never were.

Each kind of moment is as likely as any other. Of processes that train a run together, one comes to
the moment and all are killed. Checkpoints are written as often as possible.

python tests/reliability/kills.py [METHOD ...]
"""

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
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import METHODS, TINY, finish
from launched import carry_out, numbers_in

from kdbench import atomic
from kdbench.engine import checkpoint, evaluate
from kdbench.engine import run as run_module
from kdbench.engine.step import TrainingStep
from kdbench.launch.torchrun import torchrun
from kdbench.results import files
from kdbench.results.files import read_result
from kdbench.results.schema import Result

FORMS = (
    ((), 1, 4),
    (("--compile", "inductor"), 1, 1),
    (("--num-processes", "2"), 2, 2),
    (("--num-processes", "2", "--compile", "inductor"), 2, 1),
)
"""Options of the command, number of processes that train a run, and kills of each method."""

Moment = tuple[int, str, int]
"""Process, kind and number (from 1) of a moment."""

RANK = int(os.environ.get("RANK", "0"))


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


def install(moment: Callable[[str], None]) -> None:
    """Make kdbench call `moment` with the kind of each moment."""
    step, count = TrainingStep.__call__, evaluate._count

    def stepped(*arguments: Any) -> Any:
        moment("before a step")
        values = step(*arguments)
        moment("after a step")
        return values

    def counted(*arguments: Any) -> Any:
        moment("in an evaluation")
        return count(*arguments)

    @contextlib.contextmanager
    def written(kind: str, file: Path, durable: bool = True) -> Iterator[Any]:
        moment(f"before writing {kind}")
        with atomic.atomic_write(file, durable) as stream:
            yield Halting(stream, lambda: moment(f"amid writing {kind}"))
            moment(f"before {kind} gets its name")
        moment(f"after writing {kind}")

    TrainingStep.__call__ = stepped  # type: ignore[method-assign]
    evaluate._count = counted
    checkpoint.atomic_write = partial(written, "a checkpoint")  # type: ignore[attr-defined]
    files.atomic_write = partial(written, "a result")  # type: ignore[attr-defined]


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
    """Run a command, count its moments, and kill the processes of the run at the fatal one."""
    seen = Counter[str]()

    def moment(kind: str) -> None:
        seen[kind] += 1
        if (RANK, kind, seen[kind]) == fatal:
            Path("moment").write_text(kind)
            if "RANK" in os.environ:
                for process in psutil.Process(os.getppid()).children():
                    if process.pid != os.getpid():
                        process.kill()
            os.kill(os.getpid(), signal.SIGKILL)

    run_module.SAVE_SECONDS = -1
    install(moment)
    carry_out(command, folder, lambda: Path(f"moments{RANK}").write_text(json.dumps(seen)))


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
    assert code == 0 or (folder / "moment").exists(), (folder / "log").read_text()[-2000:]
    return code == 0


def numbers(folder: Path) -> dict[str, Any]:
    """Return the numbers of the result, and the final training state."""
    (file,) = folder.glob("results/*/*/*/seed*.json")
    result = numbers_in(file)
    assert result["status"] == "finished", result["reason"]
    last = max(folder.glob("runs/*/*/*/*/checkpoint-*.pt"))
    state = checkpoint._read(last, torch.device("cpu"))
    return result | {part: state[part] for part in ("method", "optimizers")}


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
            if run(command, victim, processes, fatal):
                break
            done.kills += 1
            done.moments[(victim / "moment").read_text()] += 1
            done.damaged += half_files(victim)
        done.finished += 1
        found = numbers(victim)
        parts = expected | found
        differ = [part for part in parts if not _same(found.get(part), expected.get(part))]
        done.equal += not differ
        if differ:
            print(f"{done.command}: another {', '.join(differ)}", file=sys.stderr, flush=True)
    return done


def drawn(moments: list[dict[str, int]], draw: random.Random) -> Moment:
    rank = draw.randrange(len(moments))
    kind = draw.choice(sorted(moments[rank]))
    return rank, kind, draw.randint(1, moments[rank][kind])


def main(methods: list[str]) -> None:
    draw = random.Random(0)
    rows, moments = [], Counter[str]()
    for (options, processes, kills), method in itertools.product(FORMS, methods):
        command = ["run", "--suite", "tiny.toml", "--methods", method, *options]
        with tempfile.TemporaryDirectory() as place:
            done = harm(command, kills, Path(place), draw, processes)
        print(done, file=sys.stderr, flush=True)
        moments += done.moments
        name = f"`kdbench {done.command}`"
        rows.append([name, done.kills, done.finished, done.equal, done.damaged])
    headers = ["command", "kills", "runs", "equal to one never killed", "half files"]
    print(tabulate(rows, headers, tablefmt="github"))
    print()
    print(tabulate(moments.most_common(), ["moment", "kills"], tablefmt="github"))
    sys.exit(any(runs != equal or damaged for *_, runs, equal, damaged in rows))


if __name__ == "__main__":
    from reliability import kills  # processes find what they run by this name

    if sys.argv[1:2] == ["--attempt"]:  # a process that torchrun started
        command, folder, fatal = json.loads(sys.argv[2])
        kills.attempt(command, Path(folder), fatal and tuple(fatal))
    else:
        kills.main(sys.argv[1:] or METHODS)
