"""A suite: everything that makes runs comparable, validated, immutable and hashed.

A suite fixes data, augmentation, schedule, batch size, precision, number of networks and
evaluation. It is one TOML file, in `suites/` or anywhere, and may extend another.
"""

import hashlib
import json
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, ValidationError, model_validator

from kdbench.errors import UserError, unknown
from kdbench.paths import SUITES
from kdbench.sections import (
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
from kdbench.validation import FolderName, describe, sentence


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
            raise UserError(f"--epochs must be at least 1, not {epochs}.")
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


def suite_files() -> dict[str, Path]:
    """The suites that ship, by name."""
    return {file.stem: file for file in sorted(SUITES.glob("*.toml"))}


def load_suite(name: str) -> Suite:
    """A suite by name, or by the path of its TOML file.

    Raises:
        UserError: no such suite, not TOML, or not valid; all errors at once, with their keys.
    """
    try:
        file = _find(name)
        content = _merged(file, seen=())
    except OSError as error:
        raise UserError(f"Suite '{name}' cannot be read: {error.strerror or error}.") from None
    if "@" in file.stem:
        raise UserError(
            f"Suite '{file.name}' is not valid: '@' in a suite's name stands before what a command "
            "changes in it; rename the file."
        )
    if "name" in content:
        raise UserError(
            f"Suite '{file.name}' is not valid: a suite is named after its file; remove 'name'."
        )
    content.pop("extends", None)
    try:
        return Suite.model_validate({"name": file.stem} | content)
    except ValidationError as error:
        problems = sentence(describe(error, Suite))
        raise UserError(f"Suite '{file.name}' is not valid: {problems}") from None


def _find(name: str) -> Path:
    if name.endswith(".toml"):
        file = Path(name)
        if not file.is_file():
            raise UserError(f"Suite file '{name}' does not exist.")
        return file
    files = suite_files()
    if name not in files:
        raise unknown("suite", name, files)
    return files[name]


def _merged(file: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """The file's content over that of the suite it extends."""
    if file.resolve() in seen:
        raise UserError(f"Suite '{file.name}' extends itself.")
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no TOML, a number or nest too large
        raise UserError(f"Suite '{file.name}' is not valid TOML: {error}.") from None
    parent = content.get("extends")
    if parent is None:
        return content
    if not isinstance(parent, str):
        raise UserError(f"Suite '{file.name}' is not valid: extends must be a suite's name.")
    sibling = file.parent / (parent if parent.endswith(".toml") else f"{parent}.toml")
    try:
        base = sibling if sibling.is_file() else _find(parent)
    except UserError as error:
        raise UserError(f"Suite '{file.name}' extends '{parent}': {error}") from None
    return _overlay(_merged(base, (*seen, file.resolve())), content)


def _overlay(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _overlay(base[key], value) if both else value
    return merged


def all_suites() -> Iterator[Suite]:
    """Every suite that ships."""
    for name in suite_files():
        yield load_suite(name)
