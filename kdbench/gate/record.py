"""The measurements of a gate and the baseline file that stores them, one JSON file per suite."""

from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from kdbench.atomic import atomic_write
from kdbench.bench.record import Spread
from kdbench.errors import UserError
from kdbench.results.schema import Environment, Record
from kdbench.validation import describe_problems

Losses = dict[str, list[float]]
"""Loss values of consecutive single steps, by name."""


class Trace(Record):
    """Accuracies and losses of one run."""

    top1: dict[str, float]
    """Top-1 accuracy of each role in the last epoch, in percent."""
    losses: Losses
    """Value of each weighted loss term in each step."""
    evaluation: Losses
    """Cross-entropy of each role on a few test images after each step."""


class Rounding(Record):
    """Distances that a tiny perturbation moves the losses of a method by, one value per step.

    `compare.loss_distance` defines the distance.
    """

    losses: list[float]
    evaluation: list[float]


class StepMeasurement(Record):
    """Cost of one training step, timed in alternation with all other methods."""

    ratio: Spread
    """Step time divided by the step time of the reference method in the same round."""
    rounds: int
    """Number of timed windows."""
    peak_memory_bytes: int
    """Peak memory that a step adds to what the process already holds."""
    bytes: int
    """Bytes that the operations of a step read and write; counted, not timed."""


class Entry(Record):
    """Measurements of one method on one architecture."""

    architecture: str
    method: str
    method_hash: str
    traces: dict[int, Trace]
    """Traces of finished runs, by seed."""
    unfinished: dict[int, str] = Field(default_factory=dict)
    """Status and reason of runs that did not finish, by seed. Always empty in a baseline."""
    training_flops: int | None
    """FLOPs of one training run."""
    step: StepMeasurement | None
    rounding: Rounding | None = None
    """Tolerances of the losses. Measured for baselines only."""

    @property
    def key(self) -> tuple[str, str]:
        """Architecture and method."""
        return self.architecture, self.method


class Baseline(Record):
    """Measurements of all methods at one commit, and the environment they were taken in."""

    schema_version: Literal[1] = 1
    suite: str
    suite_hash: str
    epochs: int
    seeds: int
    harness_version: int
    against: str
    """Reference method that step times are relative to."""
    environment: Environment
    entries: list[Entry]

    @property
    def architectures(self) -> list[str]:
        """Architectures of all entries, without duplicates."""
        return list(dict.fromkeys(entry.architecture for entry in self.entries))


def read_baseline(file: Path) -> Baseline:
    """Return the baseline stored in a file.

    Raises:
        UserError: The file does not exist, cannot be read, or is not a valid baseline.
    """
    try:
        return Baseline.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise UserError(
            f"Baseline '{file}' does not exist. Name another file with --baseline, or create it "
            "with --update."
        ) from None
    except OSError as error:
        raise UserError(f"Cannot read '{file}': {error.strerror or error}.") from None
    except ValidationError as error:
        problem = describe_problems(error, Baseline)[0]
        raise UserError(
            f"'{file}' is not a valid baseline ({problem}). Delete it and run with --update to "
            "create a new one."
        ) from None


def write_baseline(file: Path, baseline: Baseline) -> None:
    """Write a baseline atomically.

    Raises:
        UserError: The file cannot be written.
    """
    with atomic_write(file) as stream:
        stream.write(baseline.model_dump_json().encode() + b"\n")
