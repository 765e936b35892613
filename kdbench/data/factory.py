"""One interface to decoded and encoded image sets; the suite decides which kind is used."""

import hashlib
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
"""A split that is held decoded in memory or read encoded from disk."""


class Training(Protocol):
    """An iterable over training batches, one epoch at a time."""

    waited_seconds: float | None
    """Seconds spent waiting for batches, or None if batches are always ready."""

    @property
    def undecodable(self) -> Mapping[str, str]:
        """Names of the images that could not be decoded so far, with reasons."""

    @property
    def notes(self) -> Mapping[str, Any]:
        """Notes on the images that the result records."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the views and labels of each step from step `start` on.

        Views are (V, B, 3, H, W) float32 in channels-last memory, labels are (B,). `start` does not
        change what the remaining steps yield.
        """


class Evaluation(Protocol):
    """Evaluation batches with every image once: (B, 3, H, W) images and (B,) labels."""

    @property
    def undecodable(self) -> Mapping[str, str]: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]: ...


def open_images(source: Source, device: torch.device, workers: int) -> tuple[ImageSet, ImageSet]:
    """Return the training and the test images.

    Raises:
        UserError: the images cannot be read, or are not the dataset that the suite names.
    """
    data = source.data
    if data.encoded:
        train, test = (open_encoded(source, s, device, workers) for s in (data.train, data.test))
        return train, test
    return load_images(source, data.train).to(device), load_images(source, data.test).to(device)


def data_digest(train: ImageSet, test: ImageSet) -> str:
    """Return a hash of the images and labels of both splits."""
    return hashlib.sha256(f"{train.digest()} {test.digest()}".encode()).hexdigest()[:16]


def training_batches(
    images: ImageSet, suite: Suite, seed: int, views: int, rank: int = 0, processes: int = 1
) -> Training:
    """Return shuffled and augmented batches.

    Raises:
        UserError: the number of processes does not divide the global batch size.
    """
    if isinstance(images, EncodedImages):
        return EncodedTrainingBatches(images, suite, seed, views, rank, processes)
    return TrainingBatches(images, suite, seed, views, rank, processes)


def evaluation_batches(
    images: ImageSet, suite: Suite, rank: int = 0, processes: int = 1, substitute: bool = False
) -> Evaluation:
    """Return batches in dataset order.

    With `substitute`, another image of the class replaces one that cannot be decoded, so that it
    does not count as wrong.
    """
    if isinstance(images, EncodedImages):
        return EncodedEvaluationBatches(images, suite, rank, processes, substitute)
    return EvaluationBatches(images, suite, rank, processes)
