"""Decides by the suite how images are held; whoever trains does not know which it is."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from kdbench.data.decoded.batches import EvaluationBatches, TrainingBatches
from kdbench.data.decoded.images import Images, load_images
from kdbench.data.encoded.batches import EncodedEvaluationBatches, EncodedTrainingBatches
from kdbench.data.encoded.images import EncodedImages, open_encoded
from kdbench.data.sources.locate import Source
from kdbench.suite.suite import Suite

ImageSet = Images | EncodedImages
"""A split, in memory or on the disk."""


class Training(Protocol):
    """Training batches."""

    waited_seconds: float | None
    """For batches that were not ready; None where there is nothing to wait for."""

    @property
    def undecodable(self) -> Mapping[str, str]:
        """Reasons by name, of the images that were met and could not be decoded."""

    @property
    def notes(self) -> Mapping[str, Any]:
        """For the result."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(V, B, 3, H, W) float32 views in channels-last memory and (B,) labels, step by step.

        From step `start` on they are those of the whole epoch.
        """


class Evaluation(Protocol):
    """Each image once: (B, 3, H, W) and (B,) labels."""

    @property
    def undecodable(self) -> Mapping[str, str]: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


def open_images(source: Source, device: torch.device, workers: int) -> tuple[ImageSet, ImageSet]:
    """The training and the test images.

    Raises:
        UserError: they cannot be read, or are not the data set the suite names.
    """
    data = source.data
    if data.encoded:
        train, test = (open_encoded(source, s, device, workers) for s in (data.train, data.test))
        return train, test
    return load_images(source, data.train).to(device), load_images(source, data.test).to(device)


def training_batches(
    images: ImageSet, suite: Suite, seed: int, views: int, rank: int = 0, processes: int = 1
) -> Training:
    """Shuffled and augmented.

    Raises:
        UserError: the global batch cannot be shared out evenly.
    """
    if isinstance(images, EncodedImages):
        return EncodedTrainingBatches(images, suite, seed, views, rank, processes)
    return TrainingBatches(images, suite, seed, views, rank, processes)


def evaluation_batches(
    images: ImageSet, suite: Suite, rank: int = 0, processes: int = 1, substitute: bool = False
) -> Evaluation:
    """In order. `substitute` replaces what cannot be decoded, where it must not count as wrong."""
    if isinstance(images, EncodedImages):
        return EncodedEvaluationBatches(images, suite, rank, processes, substitute)
    return EvaluationBatches(images, suite, rank, processes)
