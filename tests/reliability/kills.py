"""Runs that are killed again and again, at moments drawn at random, beside runs that never were.

`python tests/reliability/kills.py` prints a table of what was done and lost. Moments are counted,
not timed: every step, evaluated batch and stage of writing a file is one, however short it is.
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
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate

sys.path.insert(0, str(Path(__file__).parents[1]))

from conftest import METHODS, TINY

from kdbench import atomic, cli, store
from kdbench.engine import checkpoint, evaluate
from kdbench.engine.step import TrainingStep

Numbers = tuple[dict[str, Any], dict[str, Any]]
"""A result without what depends on the machine's load, and the state it ended with."""


@dataclass
class Harm:
    """What was done to the runs of one command, and what came of it."""

    command: str
    kills: int = 0
    moments: Counter[str] = field(default_factory=Counter)
    finished: int = 0
    equal: int = 0
    damaged: int = 0
    """Files of results or checkpoints that a kill left half."""


class Moments:
    """Counts what happens, and dies of the one that is fatal."""

    def __init__(self, fatal: int | None):
        self.fatal = fatal
        self.seen = 0

    def __call__(self, name: str) -> None:
        self.seen += 1
        if self.seen == self.fatal:
            Path("moment").write_text(name)
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        step, count, writing = TrainingStep.__call__, evaluate._count, atomic.written_whole

        def stepped(*arguments: Any) -> Any:
            self("before a step")
            values = step(*arguments)
            self("after a step")
            return values

        def counted(*arguments: Any) -> Any:
            self("in an evaluation")
            return count(*arguments)

        @contextlib.contextmanager
        def written(file: Path, durable: bool = True) -> Iterator[Any]:
            self("before writing a file")
            with writing(file, durable) as stream:
                yield Halting(stream, self)
                self("before a file gets its name")
            self("after writing a file")

        TrainingStep.__call__ = stepped  # type: ignore[method-assign]
        evaluate._count = counted
        for module in (checkpoint, store):
            module.written_whole = written  # type: ignore[attr-defined]


class Halting:
    """A stream with a moment amid each write."""

    def __init__(self, stream: Any, moments: Moments):
        self.stream, self.moments = stream, moments

    def write(self, content: Any) -> None:
        view = memoryview(content)
        self.stream.write(view[: len(view) // 2])
        self.stream.flush()
        self.moments("amid writing a file")
        self.stream.write(view[len(view) // 2 :])

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def attempt(command: list[str], folder: Path, fatal: int | None) -> None:
    """In a process of its own."""
    torch.set_num_threads(1)
    os.chdir(folder)
    moments = Moments(fatal)
    moments.install()
    sys.argv = ["kdbench", *command]
    with Path("log").open("a") as log, contextlib.redirect_stdout(log):
        sys.stderr = log
        try:
            cli.main()
        finally:
            Path("count").write_text(str(moments.seen))


def run(command: list[str], folder: Path, fatal: int | None = None) -> bool:
    """Whether it ended; it was killed otherwise."""
    multiprocessing.set_forkserver_preload(["reliability.kills"])
    context = multiprocessing.get_context("forkserver")
    process = context.Process(target=attempt, args=(command, folder, fatal))
    process.start()
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL):
        raise AssertionError(f"{command} ended with {process.exitcode}: {folder / 'log'}")
    return process.exitcode == 0


def run_group(command: list[str], folder: Path, seconds: float | None) -> bool:
    """The same by all processes of a launcher, killed so long after the first checkpoint."""
    whole = [sys.executable, "-m", "kdbench", *command]
    process = subprocess.Popen(
        whole,
        cwd=folder,
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    begun = time.time()
    while process.poll() is None and not _newer(folder, begun):
        assert time.time() < begun + 100, f"{command} wrote no checkpoint in 100 seconds"
        time.sleep(0.02)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
        assert process.returncode == 0, f"{command} ended with {process.returncode}"
        return True
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    (folder / "moment").write_text("at any moment after the first epoch")
    return False


def _newer(folder: Path, moment: float) -> bool:
    files = folder.glob("runs/*/*/*/*/checkpoint-*.pt")
    return any(file.stat().st_mtime > moment for file in files)


def numbers(folder: Path) -> Numbers:
    (file,) = folder.glob("results/*/*/*/seed*.json")
    result = json.loads(file.read_text())
    assert result["status"] == "finished", result["reason"]
    del result["cost"]
    last = max(folder.glob("runs/*/*/*/*/checkpoint-*.pt"))
    content = checkpoint._read(last, torch.device("cpu"))
    assert content is not None
    return result, {"method": content["method"], "optimizers": content["optimizers"]}


def same(ours: Numbers, theirs: Numbers) -> bool:
    """Bit for bit."""
    return ours[0] == theirs[0] and _same(ours[1], theirs[1])


def _same(ours: Any, theirs: Any) -> bool:
    if isinstance(ours, torch.Tensor):
        return torch.equal(ours, theirs)
    if isinstance(ours, dict):
        return ours.keys() == theirs.keys() and all(_same(ours[k], theirs[k]) for k in ours)
    if isinstance(ours, list):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    return bool(ours == theirs)


def half_files(folder: Path) -> int:
    """Files under their own names that are not whole."""
    results = [store.read(file) for file in folder.glob("results/*/*/*/seed*.json")]
    checkpoints = folder.glob("runs/*/*/*/*/checkpoint-*.pt")
    whole = [checkpoint._read(file, torch.device("cpu")) is not None for file in checkpoints]
    return whole.count(False) + sum(not isinstance(result, store.Result) for result in results)


def harm(command: list[str], kills: int, place: Path, draw: random.Random, processes: int) -> Harm:
    """Kill runs of a command that often; each goes on until it has ended, and is compared."""
    done = Harm(" ".join(command))
    clean, victim = place / "clean", place / "victim"
    for folder in (clean, victim):
        folder.mkdir(parents=True)
        (folder / "tiny.toml").write_text(TINY)
    if processes == 1:
        assert run(command, clean)
        moments = int((clean / "count").read_text())
    else:
        assert run_group(command, clean, None)
    expected = numbers(clean)
    while done.kills < kills:
        for folder in ("results", "runs"):
            shutil.rmtree(victim / folder, ignore_errors=True)
        for attempts in itertools.count(1):
            assert attempts < 100, "it does not get on"
            left = done.kills < kills
            if processes == 1:
                ended = run(command, victim, draw.randint(1, moments) if left else None)
            else:
                ended = run_group(command, victim, draw.uniform(0, 2) if left else None)
            if ended:
                break
            done.kills += 1
            done.moments[(victim / "moment").read_text()] += 1
            done.damaged += half_files(victim)
        done.finished += 1
        done.equal += same(numbers(victim), expected)
    return done


def campaign(kills: int, compiled: int, grouped: int, seed: int) -> Iterator[Harm]:
    """So many kills of each method; of some compiled, and of some trained by two processes."""
    draw = random.Random(seed)
    base = ["run", "--suite", "tiny.toml", "--methods"]
    plans = [([*base, method], kills, 1) for method in METHODS]
    if compiled:
        plans += [([*base, m, "--compile", "inductor"], compiled, 1) for m in ("dml", "ffsd")]
    if grouped:
        two = ["--epochs", "6", "--num-processes", "2"]
        plans += [([*base, m, *two], grouped, 2) for m in ("dml", "ffsd")]
    with tempfile.TemporaryDirectory() as place:
        for number, (command, count, processes) in enumerate(plans):
            yield harm(command, count, Path(place) / str(number), draw, processes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=6, help="of each method")
    parser.add_argument("--compiled", type=int, default=3, help="of each of two methods, compiled")
    parser.add_argument("--grouped", type=int, default=3, help="of each of two, in two processes")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    rows, moments = [], Counter[str]()
    for done in campaign(asked.kills, asked.compiled, asked.grouped, asked.seed):
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
    sys.exit(any(row["runs"] != row["equal to one never killed"] for row in rows))


if __name__ == "__main__":
    from reliability import kills  # processes find what they run by this name

    kills.main()
