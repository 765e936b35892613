"""Checks that the images and labels of a split match the suite."""

import numpy as np
from torch import Tensor

from kdbench.data.sources.locate import Source
from kdbench.suite.sections import Split


def check_count(source: Source, split: Split, images: int) -> None:
    """Check that a split has the suite's number of images.

    Raises:
        UserError: It has another number.
    """
    if images != split.images:
        raise source.mismatch_error(
            f"'{split.split}' has {images:,} images instead of {split.images:,}"
        )


def check_classes(source: Source, split: Split, labels: np.ndarray, classes: int) -> None:
    """Check that every class from 0 to classes - 1 has an image.

    Raises:
        UserError: A class has none.
    """
    missing = np.setdiff1d(np.arange(classes), labels)
    if len(missing):
        raise source.mismatch_error(
            f"'{split.split}' has no image of class {missing[0]} of {classes}"
        )


def check_per_class(source: Source, split: Split, labels: Tensor, count: int) -> None:
    """Check that every class has at least `count` images.

    Raises:
        UserError: A class has fewer.
    """
    if labels.bincount().min() < count:
        raise source.mismatch_error(f"a class of '{split.split}' has fewer than {count} images")
