"""Results on disk: one JSON file a run, validated when read, written atomically.

results/<suite>/<architecture>/<method>/seed<k>.json
"""

import errno
import json
import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from kdbench.atomic import refused, written_whole
from kdbench.validation import FolderName, describe

SCHEMA_VERSION: Final = 1

LARGEST = 32 * 2**20
"""Bytes of a result; one of 300 epochs has less than 1 MiB."""

BLOCK = 4096
"""Bytes; a full disk may still have place for names of empty files."""

Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**63)]

Arithmetic = Literal["fp32", "tf32", "bf16"]
"""What matrices were multiplied in."""

Status = Literal["finished", "diverged", "failed"]


class Record(BaseModel):
    """Written once, read strictly."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Identity(Record):
    """What was run."""

    suite: FolderName
    suite_hash: str
    architecture: FolderName
    method: FolderName
    """The method's name, with the options that differ from its defaults."""
    method_hash: str
    """Of the method's source, without comments and docstrings."""
    seed: Count


class Metrics(Record):
    """Of one role on the evaluation set."""

    top1: Percent
    top5: Percent
    loss: float
    """Mean cross-entropy."""


class Epoch(Record):
    """One epoch of training and the evaluation after it."""

    epoch: int
    """Counted from 1."""
    learning_rate: float
    """The suite's rate in the last step of the epoch."""
    losses: dict[str, float]
    """Mean of each weighted term over the epoch's steps."""
    metrics: dict[str, Metrics]
    """By role; "ensemble" is the mean probability of the networks, "mean" their mean accuracy."""


class BestOnTest(Record):
    """The epoch with the best student on the test set: optimistic, never the headline."""

    epoch: int
    metrics: dict[str, Metrics]


class Cost(Record):
    """What the run took. Warm-up and evaluation are excluded from rates."""

    images_per_second: Amount | None
    """Median over windows of training steps; None where the run was too short to measure."""
    step_milliseconds: Amount | None
    """Median over the same windows."""
    training_seconds: Amount
    evaluation_seconds: Amount
    peak_memory_bytes: Count
    jobs: Count = 1
    """Runs that shared the device, this one included: only the rates of one are a measure."""
    waiting_share: Amount | None = None
    """Of the training time, for data that was not ready, an upper bound on a GPU; None where all
    images lie in memory."""
    peak_memory_kind: Literal["device", "process"]
    """Device: peak allocated on the GPU. Process: peak resident memory, images included. With
    several processes it is that of the one that took most."""
    parameters_trained: Count
    parameters_deployed: Count
    student_forward_flops: Count
    """Of one image through the deployed student, 2 per multiply-add."""
    training_flops: Annotated[int, Field(ge=0, lt=10**30)] | None = None
    """Of all training steps: forward and backward of all networks on all views, 2 per
    multiply-add; None in results of earlier versions."""


class Environment(Record):
    """What could explain a difference; no host name, no user name, no path."""

    kdbench: str
    commit: str | None
    dirty: bool | None
    python: str
    torch: str
    accelerate: str
    system: str
    device: str
    threads: int
    processes: Count
    """That trained the run together; rates are of all of them."""
    precision: Arithmetic = "fp32"
    deterministic: bool = False
    """Whether operations that give other numbers each time were forbidden; a CPU has none."""
    step: str = "eager"
    """How training steps ran: eagerly, compiled by inductor, replayed as a CUDA graph, or both."""
    command: str
    """Reproduces this run, given the data."""


TRAINED_BEFORE = "trained before on"
"""Note of a run that moved: places, and the steps done in the end there."""


class Result(Record):
    """Everything about one run."""

    schema_version: Literal[1] = SCHEMA_VERSION
    fingerprint: str
    """Of suite, method, options, architecture and seed: equal means the same run."""
    harness: int = 1
    """Version of the harness: another gives other numbers, whatever the method."""
    identity: Identity
    options: dict[str, Any]
    protocol: dict[str, Any]
    """The suite, in full."""
    status: Status
    reason: str | None = None
    """Why a run did not finish."""
    last: dict[str, Metrics] | None
    """The headline, by role: the last epoch."""
    best_on_test: BestOnTest | None
    history: list[Epoch]
    cost: Cost | None
    environment: Environment
    notes: dict[str, Any] = Field(default_factory=dict)
    """What the method wants known about its run."""

    @property
    def is_alone(self) -> bool:
        """Whether rate, time and memory are its own: of one device, which it did not share."""
        shared = self.cost is None or self.cost.jobs > 1
        return not shared and TRAINED_BEFORE not in self.notes

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.status == "finished" and (self.cost is None or "student" not in (self.last or {})):
            raise ValueError("a finished run has a cost and a student in 'last'")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """What is said twice is said alike, so that no accuracy changes on its own."""
        if [epoch.epoch for epoch in self.history] != list(range(1, len(self.history) + 1)):
            raise ValueError("the epochs of 'history' do not count from 1 without a gap")
        if self.status != "finished":
            return self
        if not all("student" in epoch.metrics for epoch in self.history):
            raise ValueError("an epoch of 'history' has no student")
        if not self.history or self.last != self.history[-1].metrics:
            raise ValueError("'last' is not what 'history' has of the last epoch")
        if self.best_on_test != best_on_test(self.history):
            raise ValueError("'best_on_test' is not the epoch of 'history' with the best student")
        return self


def best_on_test(history: Sequence[Epoch]) -> BestOnTest | None:
    """The first of the epochs with the best student; None before the first epoch."""
    best = max(history, key=lambda epoch: epoch.metrics["student"].top1, default=None)
    return None if best is None else BestOnTest(epoch=best.epoch, metrics=best.metrics)


@dataclass(frozen=True)
class Damaged:
    """A file among the results that is not one."""

    file: Path
    reason: str


def result_path(results: Path, identity: Identity) -> Path:
    """Where a run's result lies."""
    folder = results / identity.suite / identity.architecture / identity.method
    return folder / f"seed{identity.seed}.json"


def check_writable(folder: Path) -> None:
    """Fail before hours of compute rather than after.

    Raises:
        UnwritableError: the folder cannot be made, or takes no block.
    """
    probe = folder / f".kdbench-{os.getpid()}"
    with refused(f"write to '{folder}'", "; mend that, or choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with probe.open("wb") as stream:
                stream.write(bytes(BLOCK))
                stream.flush()
                os.fsync(stream.fileno())
        finally:
            probe.unlink(missing_ok=True)


def save(results: Path, result: Result) -> Path:
    """Write a result where it belongs, whole or not at all.

    Raises:
        UnwritableError: the folder or the disk does not take it.
    """
    file = result_path(results, result.identity)
    text = json.dumps(result.model_dump(mode="json"), indent=1) + "\n"
    with written_whole(file) as stream:
        stream.write(text.encode())
    return file


def read(file: Path) -> Result | Damaged:
    """One result, or why the file is none. Numbers must be numbers: "70.0" is none."""
    try:
        return Result.model_validate_json(read_small(file), strict=True)
    except ValidationError as error:
        version = _newer_version(error)
        if version is not None:
            return Damaged(
                file,
                f"it was written by a newer kdbench (schema_version {version}, and this one reads "
                f"{SCHEMA_VERSION}); update kdbench",
            )
        problems = describe(error, Result)
        more = f" and {len(problems) - 1} more problems" if len(problems) > 1 else ""
        return Damaged(file, problems[0] + more)
    except OSError as error:
        return Damaged(file, error.strerror or str(error))


def read_small(file: Path) -> bytes:
    """The content of a regular file of at most LARGEST bytes.

    Raises:
        OSError: it cannot be read, is larger, or is a folder, a pipe or a device.
    """
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")
    if status.st_size > LARGEST:
        size = f"{status.st_size / 2**20:,.0f} MiB"
        raise OSError(errno.EFBIG, f"it has {size}, and at most {LARGEST // 2**20} MiB are read")
    return file.read_bytes()


def _newer_version(error: ValidationError) -> int | None:
    """The schema version that a result says it has, where this kdbench is too old for it."""
    for problem in error.errors():
        found = problem["input"]
        if problem["loc"] == ("schema_version",) and isinstance(found, int):
            return found if found > SCHEMA_VERSION else None
    return None


def read_apart(results: Path, suite: str | None = None) -> tuple[list[Result], list[Damaged]]:
    """What `read_all` finds, results apart from what is none."""
    found = list(read_all(results, suite))
    good = [item for item in found if isinstance(item, Result)]
    return good, [item for item in found if isinstance(item, Damaged)]


def read_all(results: Path, suite: str | None = None) -> Iterator[Result | Damaged]:
    """All results of a folder, or of one suite in it."""
    for file in _files(results, 3, suite):
        if isinstance(file, Damaged):
            yield file
            continue
        found = read(file)
        if isinstance(found, Result) and file != result_path(results, found.identity):
            place = result_path(results, found.identity).relative_to(results)
            found = Damaged(file, f"it is the result that belongs at '{place}'")
        yield found


def _files(folder: Path, depth: int, name: str | None = None) -> Iterator[Path | Damaged]:
    """Files of results so many folders below, of all or of the one named, and what cannot be
    listed.
    """
    try:
        found = sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):  # or it vanished meanwhile
        return
    except OSError as error:
        yield Damaged(folder, error.strerror or str(error))
        return
    for path in found:
        if depth and name in (None, path.name):
            yield from _files(path, depth - 1)
        elif not depth and path.match("seed*.json"):
            yield path
