"""A dataset of small images as one uint8 tensor, validated and cached after the first read."""

import contextlib
import hashlib
import io
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from platformdirs import user_cache_path
from torch import Tensor

from kdbench.atomic import atomic_write, exists
from kdbench.data.sources.checks import check_classes, check_count, check_per_class
from kdbench.data.sources.locate import Source
from kdbench.data.sources.selection import first_per_class, stratified_holdout
from kdbench.errors import UserError
from kdbench.seeds import generator
from kdbench.suite.sections import Data, Split

CACHE_ENVIRONMENT = "KDBENCH_CACHE"


@dataclass(frozen=True)
class Images:
    """The N images of a split, in memory."""

    pixels: Tensor
    """(N, H, W, 3), uint8. Channels are last so that one gather builds a batch."""
    labels: Tensor
    """(N,), int64."""

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Images":
        """Move the images to a device.

        With all images there, no step waits for data.
        """
        return Images(self.pixels.to(device), self.labels.to(device))

    def digest(self) -> str:
        """Return the SHA-256 of pixels and labels."""
        digest = hashlib.sha256(str(tuple(self.pixels.shape)).encode())
        for tensor in (self.pixels, self.labels):
            digest.update(tensor.cpu().numpy().data)
        return digest.hexdigest()

    def first_per_class(self, count: int) -> "Images":
        """Return the first `count` images of each class, in the official order."""
        positions = first_per_class(self.labels, count)
        return Images(self.pixels[positions], self.labels[positions])

    def hold_out(self, share: float) -> tuple["Images", "Images"]:
        """Split off the last images of each class: (rest, held out)."""
        held_out = stratified_holdout(self.labels, share)
        rest = ~held_out
        return (
            Images(self.pixels[rest], self.labels[rest]),
            Images(self.pixels[held_out], self.labels[held_out]),
        )


def random_images(data: Data, count: int) -> Images:
    """Return noise images of a dataset's shape with cyclic labels, without reading any files."""
    size = data.image_size
    source = generator(0, "random images", count)
    pixels = torch.randint(256, (count, size, size, 3), generator=source, dtype=torch.uint8)
    return Images(pixels, torch.arange(count) % data.classes)


def load_images(source: Source, split: Split) -> Images:
    """Read a split, from the cache if possible.

    Raises:
        UserError: the files cannot be read, or are not the dataset that the suite names.
    """
    cached = _cache_file(source, split)
    arrays = _from_cache(cached, source, split)
    if arrays is None:
        arrays = _read(source, split)
        _check(source, split, *arrays)
        _to_cache(cached, *arrays)
    images = Images(torch.from_numpy(arrays[0]), torch.from_numpy(arrays[1]))
    if split.per_class is None:
        return images
    check_per_class(source, split, images.labels, split.per_class)
    return images.first_per_class(split.per_class)


def is_cached(source: Source) -> bool:
    """Return True if both splits are in the cache."""
    splits = (source.data.train, source.data.test)
    return all(exists(_cache_file(source, split)) for split in splits)


def _read(source: Source, split: Split) -> tuple[np.ndarray, np.ndarray]:
    size, classes = source.data.image_size, source.data.classes
    pixels: list[np.ndarray] = []
    labels: list[int] = []
    for index, (image, label) in enumerate(source.rows(split)):
        try:
            decoded = Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
            pixels.append(np.asarray(decoded.convert("RGB")))  # type: ignore[attr-defined]
        except (OSError, ValueError, SyntaxError) as error:
            unidentified = isinstance(error, UnidentifiedImageError)
            reason = "it is in no known format" if unidentified else error
            raise UserError(
                f"Image {index} of the '{split.split}' split of dataset '{source.data.name}' "
                f"({source.describe()}) cannot be decoded: {reason}."
            ) from error
        height, width, _ = pixels[-1].shape
        if (height, width) != (size, size):
            raise source.mismatch_error(f"an image is {width}x{height} pixels, not {size}x{size}")
        if type(label) is not int or not 0 <= label < classes:
            raise source.mismatch_error(
                f"the label {label!r} is not one of the classes 0 to {classes - 1}"
            )
        labels.append(label)
    check_count(source, split, len(pixels))
    return np.stack(pixels), np.asarray(labels, dtype=np.int64)


def _check(source: Source, split: Split, pixels: np.ndarray, labels: np.ndarray) -> None:
    """Raise if a class has no images, or if the pixels differ from the suite's checksum."""
    check_classes(source, split, labels, source.data.classes)
    if split.sha256 is not None:
        planar = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
        if hashlib.sha256(planar.data).hexdigest() != split.sha256:
            raise source.mismatch_error(f"the pixels of '{split.split}' have a different checksum")


def cache_folder() -> Path:
    """Return the folder of cached datasets: $KDBENCH_CACHE, or the user's cache folder."""
    return Path(os.environ.get(CACHE_ENVIRONMENT) or user_cache_path("kdbench"))


def _cache_file(source: Source, split: Split) -> Path:
    """Return a file name that depends on the source files and the suite: changes invalidate it."""
    stats = [(str(file.resolve()), file.stat()) for file in source.files()]
    key = [
        source.data.model_dump_json(exclude={"train", "test"}),
        split.model_dump_json(exclude={"per_class"}),
        [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats],
    ]
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    return cache_folder() / f"{source.data.name}-{split.split}-{digest}.npz"


def _from_cache(file: Path, source: Source, split: Split) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the cached pixels and labels, or None if they are missing or corrupt."""
    try:
        with np.load(file) as archive:
            pixels, labels = archive["pixels"], archive["labels"]
    except Exception:  # zipfile, tokenize and numpy raise many types for a corrupt archive
        return None
    size = source.data.image_size
    is_valid = pixels.shape == (split.images, size, size, 3) and labels.shape == (split.images,)
    return (pixels, labels) if is_valid else None


def _to_cache(file: Path, pixels: np.ndarray, labels: np.ndarray) -> None:
    # The cache only saves time, so a full or read-only disk must not stop the run.
    with contextlib.suppress(UserError), atomic_write(file) as stream:
        np.savez(stream, pixels=pixels, labels=labels)
