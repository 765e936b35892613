"""Fixtures of all tests: a tiny suite on the embedded digits, and temporary folders."""

import math
import os
import signal
import sys
from collections.abc import Container, Iterable
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from hypothesis import HealthCheck, settings

from kdbench import cli
from kdbench.data import Images, load_images, locate
from kdbench.discovery import find_methods
from kdbench.engine.device import make_accelerator
from kdbench.engine.observer import NullObserver
from kdbench.engine.run import Run
from kdbench.engine.spec import RunSpec
from kdbench.engine.stop import Stop, StoppedError
from kdbench.launch import display
from kdbench.paths import built_in_files
from kdbench.results.schema import Epoch, Result
from kdbench.suite.load import load_suite
from kdbench.suite.suite import Suite

checks = (HealthCheck.function_scoped_fixture, HealthCheck.too_slow)
for profile, examples in (("thorough", 2000), ("few", 60)):
    settings.register_profile(
        profile, max_examples=examples, deadline=None, suppress_health_check=checks
    )
settings.load_profile("few")

# Tests run in parallel, so each process and its children use one thread.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

METHODS = list(built_in_files())
TINY = """
version = 1
extends = "digits"
description = "two epochs of four steps"
batch_size = 40
[data.train]
per_class = 16
[schedule]
epochs = 2
milestones = [1]
warmup_epochs = 0
"""


def slow_except(quick: Container[Any], values: Iterable[Any]) -> list[Any]:
    """Return parameters of which only the quick ones run by default; others are marked slow."""
    return [v if v in quick else pytest.param(v, marks=pytest.mark.slow) for v in values]


@pytest.fixture(autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    """Give each test its own cache and working folder."""
    monkeypatch.setenv("KDBENCH_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.chdir(tmp_path_factory.mktemp("cwd"))


@pytest.fixture(scope="session")
def suite() -> Suite:
    """Return a suite of the digits: three epochs of four steps, evaluation in uneven batches."""
    digits = load_suite("digits").with_epochs(3)
    train = digits.data.train.model_copy(update={"per_class": 16})
    data = digits.data.model_copy(update={"train": train})
    changes = {"name": "tiny", "data": data, "batch_size": 40, "evaluation_batch_size": 100}
    return digits.model_copy(update=changes)


@pytest.fixture(scope="session")
def images(suite: Suite) -> tuple[Images, Images]:
    source = locate(suite.data, None)
    return load_images(source, suite.data.train), load_images(source, suite.data.test)


@pytest.fixture(scope="session")
def accelerator() -> Accelerator:
    return make_accelerator(cpu=True)


class Watcher(NullObserver):
    """An observer that records what it is told and can stop a run after a number of steps."""

    def __init__(self, stop_after: int | None = None):
        self.steps = self.resumed_at = 0
        self.messages: list[str] = []
        self.epochs: list[Epoch] = []
        self.stop_after = stop_after

    def on_step(self) -> None:
        self.steps += 1
        if self.steps == self.stop_after:
            raise KeyboardInterrupt

    def on_epoch(self, epoch: Epoch, resumed: bool) -> None:
        self.epochs.append(epoch)

    def on_resume(self, step: int) -> None:
        self.resumed_at = step

    def on_message(self, text: str) -> None:
        self.messages.append(text)


class Stopper(Watcher):
    """An observer that requests a stop after a number of steps, or never."""

    def __init__(self, after: int | None):
        super().__init__()
        self.after = after
        self.stop = Stop()

    def on_step(self) -> None:
        super().on_step()
        if self.steps == self.after:
            self.stop.received.append(signal.SIGTERM)


class Completing(Run):
    """A run that finishes writing its last checkpoint even if it is left as if killed."""

    def train(self) -> Result:
        try:
            return super().train()
        except StoppedError:
            raise  # it sees to that itself
        except BaseException:
            self.files.close()
            raise


@pytest.fixture
def make_run(suite, images, accelerator, tmp_path):
    """Return a function that builds a run of a method in a separate folder."""

    def build(
        method: str,
        *,
        seed: int = 0,
        folder: str = "run",
        watcher: Watcher | None = None,
        changed_suite: Suite | None = None,
        stop: Stop | None = None,
        train: Images | None = None,
        **settings: str,
    ) -> Run:
        (entry,) = find_methods([method])
        chosen = changed_suite or suite
        spec = RunSpec(chosen, "resnet8", entry, entry.options(settings), seed)
        where = tmp_path / folder, accelerator, watcher or Watcher()
        return Completing(spec, train or images[0], images[1], *where, stop=stop)

    return build


@pytest.fixture
def kdbench(monkeypatch, capsys):
    """Return a function that runs a command here and returns exit code, output and errors."""
    Path("tiny.toml").write_text(TINY)
    monkeypatch.setattr(display, "LOG_SECONDS", math.inf)  # a slow machine says nothing more

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kdbench", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        captured = capsys.readouterr()
        return int(stop.value.code or 0), captured.out, captured.err

    return run


@pytest.fixture
def run_tiny(kdbench):
    return lambda *arguments: kdbench("run", "--suite", "tiny.toml", *arguments)


def is_one_sentence(error: str) -> bool:
    return error.startswith("kdbench: ") and "Traceback" not in error and error.count("\n") == 1


@pytest.fixture
def refused(kdbench):
    """Return a function that runs a command which must be refused, and returns why."""

    def run(*arguments: str) -> str:
        code, out, error = kdbench(*arguments)
        assert (code, out) == (2, "") and is_one_sentence(error), out + error
        return error

    return run


def finish(
    command: list[str], seconds: float = 150, **environment: str
) -> tuple[int, str, list[str]]:
    """Return exit code, standard output, and kdbench's messages among the launcher's output."""
    own = os.environ | environment
    process = Popen(command, env=own, stdout=PIPE, stderr=PIPE, text=True)
    try:
        out, err = process.communicate(timeout=seconds)
    finally:
        process.terminate()  # a launcher ends its processes
        process.wait()
    return process.returncode, out, [s for s in err.splitlines() if s.startswith("kdbench: ")]
