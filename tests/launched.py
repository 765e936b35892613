"""Misbehaving and slow methods, and helpers for runs in other processes."""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from kdbench import cli
from kdbench.launch.status import RunStatus, read_status

RUN = ["-m", "kdbench", "run", "--suite", "tiny.toml", "--methods"]

METHOD = """
import os, signal, sys, time
from pathlib import Path
from kdbench.methods.baseline import Baseline

END = time.monotonic() + 100  # no test that fails leaves a process for good

class {name}(Baseline):
    epoch = 0

    def begin_epoch(self, epoch):
        self.epoch = epoch

    def forward(self, views, labels):
        {statement}
        return super().forward(views, labels)
"""
KILLED = "os.kill(os.getpid(), signal.SIGKILL)"
PACED = "time.sleep(float(Path('pace').read_text()) if time.monotonic() < END else 0)"
"""A method whose steps take as long as a file says, with unchanged numbers."""


DRAWING = '''
import torch
import torch.nn.functional as F
from kdbench.methods.baseline import Baseline

class Drawing(Baseline):
    """Draws in each step, and counts its steps in a buffer that each epoch starts anew."""

    def __init__(self, cohort, options):
        super().__init__(cohort, options)
        self.register_buffer("steps", torch.zeros(()))

    def begin_epoch(self, epoch):
        self.steps.zero_()
        self.epoch = epoch

    def forward(self, views, labels):
        self.steps += 1
        terms = super().forward(F.dropout(views, 0.3), labels)
        return {**terms, "ce/again": (self.steps + self.epoch) * next(iter(terms.values()))}
'''


def write_method(name: str, statement: str, more: str = "") -> str:
    """Write a method with a statement in its `forward` and more after its class."""
    source = METHOD.format(name=name.title(), statement=statement)
    Path(f"{name}.py").write_text(f"{source}\n{more}")
    return f"./{name}.py"


def carry_out(command: list[str], folder: Path, at_its_end: Callable[[], object]) -> None:
    """Run a command in this process, in a folder and with its output in a log, and exit."""
    os.chdir(folder)
    sys.argv = ["kdbench", *command]
    with Path("log").open("a") as log, contextlib.redirect_stdout(log):
        sys.stderr = log
        try:
            cli.main()
        finally:
            at_its_end()


def folder_of(method: str, seed: int = 0, suite: str = "tiny") -> Path:
    return Path(f"runs/{suite}/resnet8/{method}/seed{seed}")


def status_of(method: str, seed: int = 0, suite: str = "tiny") -> RunStatus:
    status = read_status(folder_of(method, seed, suite))
    assert status is not None
    return status


def result_of(method: str, seed: int = 0, suite: str = "tiny", results: str = "results") -> dict:
    return json.loads(Path(f"{results}/{suite}/resnet8/{method}/seed{seed}.json").read_text())


def numbers_in(file: Path) -> dict:
    """Return a result without the fields that depend on the machine's load or on commits."""
    result = json.loads(file.read_text())
    del result["cost"], result["environment"]["commit"], result["environment"]["dirty"]
    return result


def numbers_of(method: str, seed: int = 0, results: str = "results") -> dict:
    return numbers_in(Path(f"{results}/tiny/resnet8/{method}/seed{seed}.json"))


def eventually(condition: Callable[[], bool], seconds: float = 120) -> bool:
    """Wait until a condition holds, with a long timeout for busy machines."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def group_exists(group: int) -> bool:
    """Return True if a process of it is still running."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def left_here() -> list[psutil.Process]:
    """Return other processes in this working folder, and zombies that this process left."""
    here, this = str(Path.cwd()), os.getpid()
    zombie = {"ppid": this, "status": psutil.STATUS_ZOMBIE}
    others = [p for p in psutil.process_iter(["cwd", *zombie]) if p.pid != this]
    return [p for p in others if p.info["cwd"] == here or zombie.items() <= p.info.items()]
