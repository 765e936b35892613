"""Training input from JPEG files beside torchvision's, with as many workers, in turn.

Real photographs where KDBENCH_DATA has `imagenet-sample`, else generated ones of 500 x 375.
"""

import io
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from kdbench.data import locate, training_batches
from kdbench.data.encoded.images import open_encoded
from kdbench.data.prepare.prepare import load_or_create_manifest, prepare
from kdbench.suite.load import load_suite
from kdbench.suite.suite import Suite

DATA = Path(os.environ.get("KDBENCH_DATA") or "none").absolute()  # tests change the working folder
WORKERS = 2
BATCH = 64
IMAGES, CLASSES = 1024, 4
ROUNDS = 5


def photographs() -> Iterator[bytes]:
    """Yield IMAGES JPEG files of about 110 KB each."""
    sample = DATA / "imagenet-sample" / "validation-00000-of-00001.parquet"
    if sample.is_file():
        rows = pq.read_table(sample)["image"].to_pylist()
        yield from (rows[index % len(rows)]["bytes"] for index in range(IMAGES))
        return
    for index in range(IMAGES):
        noise = np.random.default_rng(index)
        # Detail at several scales, as photographs have it: the bytes per pixel are theirs.
        layers = [
            Image.fromarray(noise.integers(0, 256, (h, w, 3), dtype=np.uint8)).resize((500, 375))
            for h, w in ((4, 5), (30, 40), (150, 200))
        ]
        mixed = Image.blend(Image.blend(layers[0], layers[1], 0.4), layers[2], 0.35)
        stream = io.BytesIO()
        mixed.save(stream, "JPEG", quality=95)
        yield stream.getvalue()


@pytest.fixture(scope="module")
def suite() -> Suite:
    """Return a suite with ImageNet's augmentation and few images."""
    imagenet = load_suite("imagenet")
    train = imagenet.data.train.model_copy(update={"images": IMAGES})
    test = imagenet.data.test.model_copy(update={"images": CLASSES})
    data = {"train": train, "test": test, "classes": CLASSES, "hub": None}
    changes = {"data": imagenet.data.model_copy(update=data), "batch_size": BATCH}
    return imagenet.model_copy(update=changes)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    for index, encoded in enumerate(photographs()):
        for split in ("train", "val") if index < CLASSES else ("train",):
            place = folder / split / str(index % CLASSES)
            place.mkdir(parents=True, exist_ok=True)
            (place / f"{index:04d}.jpg").write_bytes(encoded)
    return folder


@pytest.fixture(scope="module")
def prepared(suite: Suite, originals: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, folder = locate(suite.data, originals), tmp_path_factory.mktemp("prepared")
    prepare(source, load_or_create_manifest(source, suite.data.resize, folder), folder, WORKERS)
    return folder


def torchvision_epoch(suite: Suite, folder: Path) -> Callable[[], int]:
    """Read all images with torchvision's usual loader; return their number."""
    augmentation = suite.augmentation
    transform = v2.Compose(
        [
            v2.RandomResizedCrop(suite.data.image_size),
            v2.RandomHorizontalFlip(),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(augmentation.mean, augmentation.std),
        ]
    )
    loader = DataLoader(
        ImageFolder(str(folder / "train"), transform),
        BATCH,
        shuffle=True,
        num_workers=WORKERS,
        persistent_workers=True,
        multiprocessing_context="forkserver",
    )
    return lambda: sum(len(labels) for _, labels in loader)


def kdbench_epoch(suite: Suite, folder: Path) -> Callable[[], int]:
    source = locate(suite.data, folder)
    images = open_encoded(source, suite.data.train, torch.device("cpu"), WORKERS)
    batches = training_batches(images, suite, seed=0, views=1)
    return lambda: sum(len(labels) for _, labels in batches.epoch(0))


@pytest.mark.benchmark(group=f"input of {IMAGES} images, {WORKERS} workers")
@pytest.mark.parametrize("images", ["originals", "prepared"])
def test_input(benchmark, suite, originals, images, request):
    """Print images per second, and their ratio to torchvision on the originals."""
    folder = request.getfixturevalue(images)
    ours, theirs = kdbench_epoch(suite, folder), torchvision_epoch(suite, originals)
    assert ours() == theirs() == IMAGES  # workers start
    usual: list[float] = []

    def in_turn() -> None:
        started = time.perf_counter()
        theirs()
        usual.append(time.perf_counter() - started)

    benchmark.pedantic(ours, setup=in_turn, rounds=ROUNDS)
    pairs = zip(usual, benchmark.stats.stats.data, strict=True)
    ratios = [their / our for their, our in pairs]
    benchmark.extra_info |= {
        "images/s": IMAGES / benchmark.stats.stats.median,
        "torchvision images/s": IMAGES / statistics.median(usual),
        "ratio": statistics.median(ratios),
        "ratio, least and most": (min(ratios), max(ratios)),
    }
