"""The suite: data, augmentation, schedule, batch size, precision, number of networks, evaluation.

A suite is a TOML file, validated, immutable and hashed. It may extend another suite.
"""

import hashlib
import json
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from kdbench.errors import UserError
from kdbench.suite.sections import (
    Augmentation,
    Data,
    Names,
    OptimizerRecipe,
    Positive,
    Precision,
    Schedule,
    Section,
    raise_problems,
)
from kdbench.validation import FolderName


class Suite(Section):
    """A suite. Changes made on the command line become part of its name."""

    version: Literal[1]
    name: FolderName
    description: str
    architectures: Names
    """Architectures that can be selected."""
    default_architecture: str
    networks: Annotated[int, Field(ge=1, le=8)]
    """Number of networks K, for methods that do not fix it."""
    seeds: Positive
    """Default number of seeds."""
    batch_size: Positive
    """Global batch size over all processes."""
    evaluation_batch_size: Positive
    evaluate_every: Positive = 1
    """Number of epochs between evaluations. The last epoch is always evaluated."""
    precision: Precision
    """Precision: fp32 (TF32 on GPUs that support it) or bf16 autocast."""
    data: Data
    augmentation: Augmentation
    optimizer: OptimizerRecipe
    schedule: Schedule

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        problems = []
        if self.default_architecture not in self.architectures:
            problems.append("default_architecture must be one of architectures")
        if self.batch_size > self.data.count(self.data.train):
            problems.append("batch_size is larger than the training set")
        padding, crop = self.augmentation.padding, self.augmentation.random_resized_crop
        if self.data.encoded and (crop is None or padding is not None):
            problems.append("encoded images need augmentation.random_resized_crop, not padding")
        if not self.data.encoded and (padding is None or crop is not None):
            problems.append("decoded images need augmentation.padding, not random_resized_crop")
        if padding is not None and padding >= self.data.image_size:
            problems.append("augmentation.padding must be less than data.image_size")
        return raise_problems(self, problems)

    @property
    def steps_per_epoch(self) -> int:
        """Number of steps in an epoch; the incomplete last batch is dropped."""
        return self.data.count(self.data.train) // self.batch_size

    @property
    def total_steps(self) -> int:
        """Number of steps in the whole schedule."""
        return self.steps_per_epoch * self.schedule.epochs

    def is_evaluated(self, epoch: int) -> bool:
        """Return True if there is an evaluation after an epoch, counted from 1."""
        return epoch % self.evaluate_every == 0 or epoch == self.schedule.epochs

    def with_epochs(self, epochs: int) -> "Suite":
        """Return the suite with another number of epochs, which becomes part of its name.

        Raises:
            UserError: The number of epochs is not positive.
        """
        if epochs < 1:
            raise UserError(f"--epochs must be at least 1, got {epochs}.")
        if epochs == self.schedule.epochs:
            return self
        return self._changed("epochs", epochs, schedule=self.schedule.scaled(epochs))

    def with_precision(self, precision: Precision) -> "Suite":
        """Return the suite with another precision, which becomes part of its name."""
        if precision == self.precision:
            return self
        return self._changed("precision", precision, precision=precision)

    def _changed(self, option: str, value: object, **update: object) -> "Suite":
        name, _, changes = self.name.partition("@")
        # Changes are sorted, so that equal suites have equal names.
        marks = sorted([*filter(None, changes.split(",")), f"{option}={value}"])
        return self.model_copy(update={"name": f"{name}@{','.join(marks)}", **update})

    def digest(self, schedule: bool = True) -> str:
        """Return a hash of everything that can change a number, but not of the data's location.

        Without `schedule`, suites that differ only in their number of epochs have equal hashes.
        """
        left_out: dict[str, Any] = {
            "description": True,
            "architectures": True,
            "default_architecture": True,
            "seeds": True,
            "data": {"hub", "torchvision", "embedded", "image_column", "label_column"},
        }
        if not schedule:
            left_out |= {"name": True, "schedule": True}
        protocol = self.model_dump(
            mode="json",
            exclude_defaults=True,  # new settings must not change the hashes of existing suites
            exclude=left_out,
        )
        return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]
