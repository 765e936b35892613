"""What a gate measures, and the baseline it keeps: one small JSON file a suite."""

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from kdbench.atomic import atomic_write
from kdbench.bench.record import Spread
from kdbench.errors import UserError
from kdbench.results.schema import Environment, Record
from kdbench.validation import describe

Losses = dict[str, list[float]]
"""By name, in one of the first steps after the other."""


class Trace(Record):
    """What one run showed."""

    top1: dict[str, float]
    """Of each role in the last epoch, per cent."""
    losses: Losses
    """Each weighted term."""
    evaluation: Losses
    """Cross-entropy of each role on a few test images, after the step."""


class Rounding(Record):
    """How far rounding may move a trace, by step: see `compare.moved`."""

    losses: list[float]
    evaluation: list[float]


class StepFigures(Record):
    """What a training step costs, measured in turn with all other methods."""

    ratio: Spread
    """Of its time to that of `against` in the same round."""
    rounds: int
    peak_memory_bytes: int
    """That a step adds to what the process held."""
    bytes: int
    """That its operations read and write: counted, not timed."""


class Entry(Record):
    """One method on one architecture."""

    architecture: str
    method: str
    method_hash: str
    traces: dict[int, Trace]
    """By seed."""
    unfinished: dict[int, str] = Field(default_factory=dict)
    """By seed, how and why a run has no trace; a baseline has none of these."""
    training_flops: int | None
    """Of one run."""
    step: StepFigures | None
    rounding: Rounding | None = None
    """A baseline has it."""

    @property
    def key(self) -> tuple[str, str]:
        return self.architecture, self.method


class Baseline(Record):
    """What all methods did at one commit, and where."""

    schema_version: Literal[1] = 1
    suite: str
    suite_hash: str
    epochs: int
    seeds: int
    harness_version: int
    against: str
    """The method that step times are relative to."""
    environment: Environment
    entries: list[Entry]

    @property
    def architectures(self) -> list[str]:
        return list(dict.fromkeys(entry.architecture for entry in self.entries))


def read_baseline(file: Path) -> Baseline:
    """A stored baseline.

    Raises:
        UserError: there is none, or the file is not one.
    """
    try:
        return Baseline.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"There is no baseline '{file}'; name one with --baseline, or make it with --update."
        ) from None
    except OSError as error:
        raise UserError(f"Cannot read '{file}': {error.strerror or error}.") from None
    except ValidationError as error:
        problem = describe(error, Baseline)[0]
        raise UserError(
            f"'{file}' is no valid baseline ({problem}); remove it, and --update makes a new one."
        ) from None


def write_baseline(file: Path, baseline: Baseline) -> None:
    """Write it whole or not at all.

    Raises:
        UserError: the folder cannot be written.
    """
    with atomic_write(file) as stream:
        stream.write(baseline.model_dump_json().encode() + b"\n")
