"""Training input and decoding of JPEG files beside torchvision's, in turn.

Real photographs where KDBENCH_DATA has `imagenet-sample`, else generated ones of 500 x 375.
"""

import io
import os
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from timeit import timeit

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from encoded_data import opened, write_folders
from pictures import encode
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from kdbench.data import locate, training_batches
from kdbench.data.encoded.crops import DRAWS, FLIP, random_resized_box
from kdbench.data.encoded.decode import decode_crop
from kdbench.data.prepare.prepare import QUALITY, load_or_create_manifest, prepare
from kdbench.data.prepare.shrink import shrink
from kdbench.suite.load import load_suite

FILES = Path(os.environ.get("KDBENCH_DATA") or "none").absolute()  # tests change the working folder
WORKERS, BATCH, ROUNDS = 2, 64, 5
IMAGES, CLASSES = 1024, 4
IMAGENET = load_suite("imagenet")
TRAIN = IMAGENET.data.train.model_copy(update={"images": IMAGES})
TEST = IMAGENET.data.test.model_copy(update={"images": CLASSES})
SPLITS = {"train": TRAIN, "test": TEST}
DATA = IMAGENET.data.model_copy(update=SPLITS | {"classes": CLASSES, "hub": None})
SUITE = IMAGENET.model_copy(update={"data": DATA, "batch_size": BATCH})
CROP = SUITE.augmentation.random_resized_crop
CROP_AND_FLIP = v2.Compose(
    [v2.RandomResizedCrop(DATA.image_size), v2.RandomHorizontalFlip(), v2.PILToTensor()]
)


def photographs() -> Iterator[bytes]:
    """Yield IMAGES JPEG files of about 110 KB each."""
    sample = FILES / "imagenet-sample" / "validation-00000-of-00001.parquet"
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
        yield encode(mixed, quality=95)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [(encoded, index % CLASSES) for index, encoded in enumerate(photographs())]
    folder = tmp_path_factory.mktemp("originals")
    return write_folders(folder, {"train": rows, "validation": rows[:CLASSES]})


def compare(benchmark, clock: Callable, ours: Callable, theirs: Callable, images: int) -> None:
    """Time both in turn; print images per second, and their ratio to torchvision."""
    our_seconds: list[float] = []
    their_seconds: list[float] = []
    benchmark.pedantic(
        lambda: our_seconds.append(timeit(ours, timer=clock, number=1)),
        setup=lambda: their_seconds.append(timeit(theirs, timer=clock, number=1)),
        rounds=ROUNDS,
    )
    ratios = [their / our for their, our in zip(their_seconds, our_seconds, strict=True)]
    benchmark.extra_info |= {
        "images/s": images / statistics.median(our_seconds),
        "torchvision images/s": images / statistics.median(their_seconds),
        "ratio": statistics.median(ratios),
        "ratio, least and most": (min(ratios), max(ratios)),
    }


@pytest.mark.benchmark(group=f"input of {IMAGES} images, {WORKERS} workers")
@pytest.mark.parametrize("images", ["originals", "prepared"])
def test_input(benchmark, originals, images, tmp_path):
    folder = originals
    if images == "prepared":
        source, folder = locate(SUITE.data, originals), tmp_path
        prepare(source, load_or_create_manifest(source, SUITE.data.resize, folder), folder, WORKERS)
    batches = training_batches(opened(SUITE, folder, WORKERS)[0], SUITE, seed=0, views=1)
    normalize = v2.Normalize(SUITE.augmentation.mean, SUITE.augmentation.std)
    transform = v2.Compose([CROP_AND_FLIP, v2.ToDtype(torch.float32, scale=True), normalize])
    loader = DataLoader(
        ImageFolder(str(originals / "train"), transform),
        BATCH,
        shuffle=True,
        num_workers=WORKERS,
        persistent_workers=True,
        multiprocessing_context="forkserver",
    )

    def ours() -> int:
        return sum(len(labels) for _, labels in batches.epoch(0))

    def theirs() -> int:
        return sum(len(labels) for _, labels in loader)

    assert ours() == theirs() == IMAGES  # workers start
    compare(benchmark, time.perf_counter, ours, theirs, IMAGES)


def kdbench_crop(encoded: bytes) -> Tensor:
    draws, size = torch.rand(DRAWS).tolist(), DATA.image_size
    (crop,) = decode_crop(encoded, lambda h, w: [random_resized_box(h, w, draws, CROP)], size)
    return crop.flip(1) if draws[FLIP] < 0.5 else crop


@pytest.mark.benchmark(group="decode on one core, RandomResizedCrop and flip, 100 images")
@pytest.mark.parametrize("images", ["originals", "prepared"])
def test_crops(benchmark, images):
    originals = [encoded for encoded, _ in zip(photographs(), range(100), strict=False)]
    chosen = originals
    if images == "prepared":
        chosen = [shrink(encoded, DATA.resize, QUALITY) for encoded in originals]

    def ours() -> None:
        for encoded in chosen:
            kdbench_crop(encoded)

    def theirs() -> None:
        for encoded in originals:
            CROP_AND_FLIP(Image.open(io.BytesIO(encoded)).convert("RGB"))

    compare(benchmark, time.process_time, ours, theirs, len(originals))
