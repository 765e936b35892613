"""The sections of a suite: data, augmentation, optimizer and schedule."""

from typing import Annotated, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, model_validator

Positive = Annotated[int, Field(gt=0)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# Values are strict, so "0.1" is not a number. Tuples are not, because TOML has only arrays.
Channels = Annotated[tuple[float, float, float], Field(strict=False)]
Names = Annotated[tuple[str, ...], Field(strict=False)]
Pair = Annotated[tuple[float, float], Field(strict=False)]

Precision = Literal["fp32", "bf16"]


class Section(BaseModel):
    """Base class of immutable sections that reject unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Checked = TypeVar("Checked", bound=Section)


def raise_problems(section: Checked, problems: list[str]) -> Checked:
    """Return the section, or raise one error with all problems if there are any."""
    if problems:
        raise ValueError("; ".join(problems))
    return section


class Split(Section):
    """A split of a dataset."""

    split: str
    """Name of the split, in the layout of the hub."""
    images: Positive
    """Number of images that the split must have."""
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    """Checksum of the uint8 pixels in NCHW order; other pixels are rejected."""
    per_class: Positive | None = None
    """Number of images per class to keep, the first ones in the source's order; None keeps all."""


class Data(Section):
    """A dataset: where its images come from, and what they must be."""

    name: str
    hub: str | None = None
    """Repository on the Hugging Face hub."""
    torchvision: Literal["CIFAR10", "CIFAR100"] | None = None
    """Class of torchvision.datasets that reads the original files and verifies their checksums."""
    embedded: str | None = None
    """Folder of the Parquet files, relative to the suites."""
    image_column: str
    label_column: str
    classes: Positive
    image_size: Positive
    """Side in pixels of images, or of the crops of encoded images."""
    train: Split
    test: Split
    encoded: bool = False
    """Keep images of any size encoded on disk; otherwise all images are decoded in memory."""
    resize: Positive | None = None
    """Shorter side of an encoded image in evaluation, before the center crop."""
    class_stride: Positive = 1
    """Keep every n-th class of the source, whose label n * k becomes k. `classes` counts these."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        parts = (self.train, self.test)
        problems = []
        if any(self.count(split) > split.images for split in parts):
            problems.append("per_class times classes is more than the images of the split")
        if self.encoded:
            if self.resize is None or self.resize < self.image_size:
                problems.append("encoded images need a resize that is no less than image_size")
            if self.torchvision or self.embedded or any(split.sha256 for split in parts):
                problems.append("encoded images take no torchvision, embedded or sha256")
        elif self.resize is not None or self.class_stride > 1:
            problems.append("resize and class_stride are for encoded images")
        if self.class_stride > 1 and any(split.per_class is None for split in parts):
            problems.append("class_stride needs a per_class in train and in test")
        return raise_problems(self, problems)

    def count(self, split: Split) -> int:
        """Return the number of images of a split that are used."""
        return split.images if split.per_class is None else split.per_class * self.classes


class RandomResizedCrop(Section):
    """Crop of random area and aspect ratio, resized to the image size."""

    scale: Pair
    """Bounds of the area as a share of the image."""
    ratio: Pair
    """Bounds of the aspect ratio (width / height), drawn on a logarithmic scale."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        problems = []
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            problems.append("scale must be two increasing shares of the area")
        if not 0 < self.ratio[0] <= self.ratio[1]:
            problems.append("ratio must be two increasing positive numbers")
        return raise_problems(self, problems)


class Augmentation(Section):
    """Augmentation of training images, and the normalization of all images."""

    padding: Annotated[int, Field(ge=0)] | None = None
    """Reflect padding on each side in pixels, before a random crop to the image size."""
    random_resized_crop: RandomResizedCrop | None = None
    """Crop of encoded images, which replaces padding."""
    horizontal_flip: bool
    mean: Channels
    std: Channels

    @model_validator(mode="after")
    def _positive(self) -> Self:
        if min(self.std) <= 0:
            raise ValueError("std must be positive")
        return self


class OptimizerRecipe(Section):
    """Settings for SGD with momentum."""

    learning_rate: Annotated[float, Field(gt=0)]
    momentum: Fraction
    nesterov: bool
    weight_decay: Annotated[float, Field(ge=0)]

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov needs a momentum above 0")
        return self


class Schedule(Section):
    """MultiStep schedule after a linear warm-up, in epochs. Milestones may be fractions."""

    epochs: Positive
    milestones: Annotated[tuple[float, ...], Field(strict=False)]
    gamma: Annotated[float, Field(gt=0, le=1)]
    warmup_epochs: Annotated[float, Field(ge=0)]

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError("milestones must increase")
        if any(not 0 < milestone < self.epochs for milestone in self.milestones):
            found = list(self.milestones)
            raise ValueError(f"milestones {found} must lie between 0 and epochs ({self.epochs})")
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs must be less than epochs ({self.epochs})")
        return self

    def scaled(self, epochs: int) -> "Schedule":
        """Return a schedule of the same shape with another number of epochs."""
        return Schedule(
            epochs=epochs,
            milestones=tuple(milestone * epochs / self.epochs for milestone in self.milestones),
            gamma=self.gamma,
            warmup_epochs=self.warmup_epochs * epochs / self.epochs,
        )
