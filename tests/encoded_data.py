"""Tiny encoded photographs of four classes in every layout, and a suite for them."""

from functools import cache
from pathlib import Path

import datasets
import pictures
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from kdbench.data import locate
from kdbench.data.encoded.images import EncodedImages, open_encoded
from kdbench.suite.load import load_suite
from kdbench.suite.suite import Suite

CLASSES, TRAIN, TEST = 4, 20, 10
"""Numbers of classes, training images and test images. Labels cycle through the classes."""

SUITE = f"""
version = 1
extends = "imagenet"
description = "two epochs of two steps"
architectures = ["resnet8"]
default_architecture = "resnet8"
networks = 2
batch_size = 8
evaluation_batch_size = 4
[data]
name = "photos"
hub = "nobody/photos"
classes = {CLASSES}
image_size = 32
resize = 36
train.images = {TRAIN}
test.images = {TEST}
[schedule]
epochs = 2
milestones = [1]
warmup_epochs = 0
"""


@cache
def photo(split: str, index: int) -> bytes:
    """Return a JPEG whose size depends on `index`."""
    height, width, seed = 52 - 4 * (index % 5), 40 + 3 * (index % 7), 100 * len(split) + index
    return pictures.encode(pictures.photo(height, width, seed), quality=90)


Content = dict[str, list[tuple[bytes, int]]]


def content(**damaged: list[int]) -> Content:
    """Return the encoded images and labels of each split; the damaged ones are no images."""
    return {
        split: [
            (b"no image" if i in damaged.get(split, ()) else photo(split, i), i % CLASSES)
            for i in range(count)
        ]
        for split, count in (("train", TRAIN), ("validation", TEST))
    }


def table(rows: list[tuple[bytes, int]]) -> pa.Table:
    images = [{"bytes": image, "path": f"photo{i}.jpg"} for i, (image, _) in enumerate(rows)]
    return pa.table({"image": images, "label": [label for _, label in rows]})


def write_parquet(folder: Path, rows: Content | None = None) -> Path:
    """Write the hub's layout, with the training split in two files."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, images in (rows or content()).items():
        half = len(images) // 2
        parts = [images[:half], images[half:]] if split == "train" else [images]
        for shard, part in enumerate(parts):
            name = f"{split}-{shard:05d}-of-{len(parts):05d}.parquet"
            pq.write_table(table(part), folder / name)
    return folder


def write_saved(folder: Path, rows: Content | None = None) -> Path:
    """Write the layout of `save_to_disk` of the `datasets` library."""
    splits = {split: datasets.Dataset(table(part)) for split, part in (rows or content()).items()}
    saved = datasets.DatasetDict(splits).cast_column("image", datasets.Image(decode=False))
    saved.save_to_disk(folder)
    return folder


def write_folders(folder: Path, rows: Content | None = None) -> Path:
    """Write one folder per class; the images of a class keep their order."""
    for split, images in (rows or content()).items():
        for index, (image, label) in enumerate(images):
            place = folder / ("val" if split == "validation" else split) / f"n{label:08d}"
            place.mkdir(parents=True, exist_ok=True)
            (place / f"n{label:08d}_{index:03d}.JPEG").write_bytes(image)
    return folder


LAYOUTS = {"parquet": write_parquet, "save_to_disk": write_saved, "imagefolder": write_folders}


def photo_suite(batch_size: int = 8) -> Suite:
    """Write `photos.toml` to the working folder and load it."""
    text = SUITE.replace("\nbatch_size = 8", f"\nbatch_size = {batch_size}")
    Path("photos.toml").write_text(text)
    return load_suite("photos.toml")


def opened(suite: Suite, folder: Path, workers: int = 0) -> tuple[EncodedImages, EncodedImages]:
    source, device = locate(suite.data, folder), torch.device("cpu")
    splits = (suite.data.train, suite.data.test)
    train, test = (open_encoded(source, split, device, workers) for split in splits)
    return train, test
