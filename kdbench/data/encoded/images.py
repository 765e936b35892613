"""A data set of images that stay encoded on the disk: checked, and the part of it that is used."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from kdbench.data.encoded.decode import decoder_name
from kdbench.data.prepare.manifest import read_manifest
from kdbench.data.sources.locate import Source
from kdbench.data.sources.readers import Reader, open_reader
from kdbench.data.sources.selection import first_per_class, stratified_holdout
from kdbench.suite.sections import Split

PROBES = 64
"""Images that a digest reads."""


@dataclass(frozen=True)
class EncodedImages:
    """N images of a split."""

    split: str
    reader: Reader
    rows: Tensor
    """(N,), int64: where the reader has them."""
    labels: Tensor
    """(N,), int64: classes of the suite."""
    device: torch.device
    """That batches go to."""
    workers: int
    """Processes that decode; 0 decodes in the one that asks."""
    notes: Mapping[str, str]
    """For results: what pixels come of."""

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, position: int) -> bytes:
        """One encoded image.

        Raises:
            OSError: the disk does not give it.
        """
        return self.reader.read(int(self.rows[position]))

    def name(self, position: int) -> str:
        """What to call an image in messages."""
        return f"{self.split}: {self.reader.name(int(self.rows[position]))}"

    def digest(self) -> str:
        """Of labels, of what makes the pixels, and of images here and there: all would take long.

        Raises:
            OSError: the disk does not give them.
        """
        digest = hashlib.sha256(repr(sorted(self.notes.items())).encode())
        digest.update(self.labels.numpy().data)
        for position in range(0, len(self), max(1, len(self) // PROBES)):
            digest.update(self.read(position))
        return digest.hexdigest()

    def hold_out(self, share: float) -> tuple["EncodedImages", "EncodedImages"]:
        """The last images of each class apart from the rest: (rest, held out)."""
        held = stratified_holdout(self.labels, share)
        return self._only(~held), self._only(held)

    def _only(self, chosen: Tensor) -> "EncodedImages":
        return replace(self, rows=self.rows[chosen], labels=self.labels[chosen])


def open_encoded(source: Source, split: Split, device: torch.device, workers: int) -> EncodedImages:
    """A split, checked as far as that can be done without decoding it.

    Raises:
        UserError: it cannot be read, or is not the data set the suite names.
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
    if labels.bincount().min() < split.per_class:
        raise source.refusal(f"a class of '{split.split}' has fewer than {split.per_class} images")
    return images._only(first_per_class(labels, split.per_class))


def _notes(source: Source) -> dict[str, str]:
    manifest = None if source.folder is None else read_manifest(source.folder)
    needed = source.data.resize
    if manifest is not None and needed is not None and manifest.settings.shorter_side < needed:
        raise source.refusal(
            f"its images were prepared with a shorter side of {manifest.settings.shorter_side} "
            f"pixels, and the suite evaluates at {needed}; prepare them for this suite"
        )
    return {
        "decoder": decoder_name(),
        "images": "originals" if manifest is None else manifest.summary,
    }


def _check(source: Source, split: Split, labels: np.ndarray) -> None:
    """As many images as the suite says, of all its classes and no others."""
    classes = source.data.classes * source.data.class_stride
    if len(labels) != split.images:
        raise source.refusal(f"'{split.split}' has {len(labels)} images, not {split.images}")
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise source.refusal(f"the label {wrong[0]} is none of the classes 0 to {classes - 1}")
    absent = np.setdiff1d(np.arange(classes), labels)
    if len(absent):
        raise source.refusal(f"'{split.split}' has no image of class {absent[0]} of {classes}")
