"""Image sets that stay encoded on disk, validated and reduced to the images that are used."""

import contextlib
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kdbench.data.encoded.decode import decoder_name
from kdbench.data.prepare.manifest import read_manifest
from kdbench.data.sources.checks import check_classes, check_count, check_per_class
from kdbench.data.sources.locate import Source
from kdbench.data.sources.readers import Reader, open_reader
from kdbench.data.sources.selection import first_per_class, stratified_holdout
from kdbench.suite.sections import Split

DIGEST_SAMPLES = 64
"""Number of images that a digest reads besides the first one of each class."""


@dataclass(frozen=True)
class EncodedImages:
    """Encoded images of a split."""

    split: str
    reader: Reader
    rows: Tensor
    """Rows of the images in the reader, (N,) int64."""
    labels: Tensor
    """Classes in the suite, (N,) int64."""
    device: torch.device
    """Device that batches go to."""
    workers: int
    """Number of processes that decode; 0 means that the calling process decodes."""
    notes: Mapping[str, str]
    """Notes for results on the decoder and the kind of images."""

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, position: int) -> bytes:
        """Return one encoded image.

        Raises:
            OSError: The image cannot be read.
        """
        return self.reader.read(int(self.rows[position]))

    def name(self, position: int) -> str:
        """Return the name of an image for messages."""
        return f"{self.split}: {self.reader.name(int(self.rows[position]))}"

    def digest(self) -> str:
        """Return a SHA-256 hash of all labels and of a sample of the images.

        The sample has the first image of each class and DIGEST_SAMPLES others, evenly spaced. An
        image that cannot be read counts as empty.
        """
        labels = self.labels.numpy()
        digest = hashlib.sha256(labels.data)
        sample = {*np.unique(labels, return_index=True)[1].tolist()}
        sample |= {*range(0, len(self), max(1, len(self) // DIGEST_SAMPLES))}
        for position in sorted(sample):
            with contextlib.suppress(OSError):
                digest.update(self.read(position))
            digest.update(b"\n")
        return digest.hexdigest()

    def hold_out(self, share: float) -> tuple["EncodedImages", "EncodedImages"]:
        """Split off the last images of each class; return the rest and the held-out images."""
        held = stratified_holdout(self.labels, share)
        return self._select(~held), self._select(held)

    def _select(self, chosen: Tensor) -> "EncodedImages":
        return replace(self, rows=self.rows[chosen], labels=self.labels[chosen])


def open_encoded(source: Source, split: Split, device: torch.device, workers: int) -> EncodedImages:
    """Open a split and validate it as far as possible without decoding.

    Raises:
        UserError: The split cannot be read, or does not match the suite.
    """
    reader, found = open_reader(source, split)
    _check(source, split, found)
    stride = source.data.class_stride
    kept = np.flatnonzero(found % stride == 0)
    rows, labels = torch.from_numpy(kept), torch.from_numpy(found[kept] // stride)
    notes = _notes(source)
    images = EncodedImages(split.split, reader, rows, labels, device, workers, notes)
    if split.per_class is None:
        return images
    check_per_class(source, split, labels, split.per_class)
    return images._select(first_per_class(labels, split.per_class))


def _notes(source: Source) -> dict[str, str]:
    manifest = None if source.folder is None else read_manifest(source.folder)
    required = source.data.resize
    if manifest is not None and required is not None and manifest.settings.shorter_side < required:
        raise source.mismatch_error(
            f"its images were prepared with a shorter side of {manifest.settings.shorter_side} "
            f"pixels, but the suite evaluates at {required}; prepare them for this suite"
        )
    return {
        "decoder": decoder_name(),
        "images": "originals" if manifest is None else manifest.summary,
    }


def _check(source: Source, split: Split, labels: np.ndarray) -> None:
    """Check the number of images, and that their labels are exactly the suite's classes."""
    classes = source.data.classes * source.data.class_stride
    check_count(source, split, len(labels))
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise source.mismatch_error(f"label {wrong[0]} is not in 0 to {classes - 1}")
    check_classes(source, split, labels, classes)
