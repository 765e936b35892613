"""A suite: everything that makes runs comparable, validated, immutable and hashed.

A suite fixes data, augmentation, schedule, batch size, precision, number of networks and
evaluation. It is one TOML file, in `suites/` or anywhere, and may extend another.
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
    all_well,
)
from kdbench.validation import FolderName


class Suite(Section):
    """One suite. `name` is the file's; a suite changed on the command line carries the change."""

    version: Literal[1]
    name: FolderName
    description: str
    architectures: Names
    """Architectures offered."""
    default_architecture: str
    networks: Annotated[int, Field(ge=1, le=8)]
    """K, for methods that do not fix their own."""
    seeds: Positive
    """Runs per method unless the command says otherwise."""
    batch_size: Positive
    """Global: over all processes."""
    evaluation_batch_size: Positive
    precision: Precision
    """fp32 (which is TF32 on a GPU that has it), or bf16 autocast."""
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
        return all_well(self, problems)

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in an epoch; the incomplete last one is dropped."""
        return self.data.count(self.data.train) // self.batch_size

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.schedule.epochs

    def with_epochs(self, epochs: int) -> "Suite":
        """The suite over another number of epochs, under a name that says so.

        Raises:
            UserError: the number of epochs is not positive.
        """
        if epochs < 1:
            raise UserError(f"--epochs must be at least 1, got {epochs}.")
        if epochs == self.schedule.epochs:
            return self
        return self._changed("epochs", epochs, schedule=self.schedule.scaled(epochs))

    def with_precision(self, precision: Precision) -> "Suite":
        """The suite in another precision, under a name that says so."""
        if precision == self.precision:
            return self
        return self._changed("precision", precision, precision=precision)

    def _changed(self, option: str, value: object, **update: object) -> "Suite":
        name, _, changes = self.name.partition("@")
        # In one order, whichever change came first: the same suite has the same name.
        marks = sorted([*filter(None, changes.split(",")), f"{option}={value}"])
        return self.model_copy(update={"name": f"{name}@{','.join(marks)}", **update})

    def digest(self, schedule: bool = True) -> str:
        """Hash of everything that can change a number; not of where the images lie.

        Without the schedule, and the name that tells it, suites over other numbers of epochs are
        equal.
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
            exclude_defaults=True,  # a setting that is added later leaves old hashes as they are
            exclude=left_out,
        )
        return hashlib.sha256(json.dumps(protocol, sort_keys=True).encode()).hexdigest()[:16]
