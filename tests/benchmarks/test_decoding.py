"""Decoding speed of one core for crops of 224 pixels, in alternation with torchvision."""

import io
import statistics
import time
from collections.abc import Callable

import pytest
import torch
from PIL import Image
from test_input import photographs
from torch import Tensor
from torchvision.transforms import v2

from kdbench.data.encoded.crops import DRAWS, FLIP, random_resized_box
from kdbench.data.encoded.decode import decode_crop
from kdbench.data.prepare.prepare import QUALITY
from kdbench.data.prepare.shrink import shrink
from kdbench.suite.load import load_suite

COUNT, ROUNDS, SIZE = 100, 5, 224
CROP = load_suite("imagenet").augmentation.random_resized_crop
TRANSFORM = v2.Compose([v2.RandomResizedCrop(SIZE), v2.RandomHorizontalFlip(), v2.PILToTensor()])


@pytest.fixture(scope="module")
def originals() -> list[bytes]:
    return [encoded for encoded, _ in zip(photographs(), range(COUNT), strict=False)]


@pytest.fixture(scope="module")
def prepared(originals) -> list[bytes]:
    return [shrink(encoded, 256, QUALITY) for encoded in originals]


def torchvision_crop(encoded: bytes) -> Tensor:
    return TRANSFORM(Image.open(io.BytesIO(encoded)).convert("RGB"))


def kdbench_crop(encoded: bytes) -> Tensor:
    draws = torch.rand(DRAWS).tolist()
    (crop,) = decode_crop(encoded, lambda h, w: [random_resized_box(h, w, draws, CROP)], SIZE)
    return crop.flip(1) if draws[FLIP] < 0.5 else crop


def seconds(make: Callable[[bytes], Tensor], images: list[bytes]) -> float:
    started = time.process_time()
    for encoded in images:
        make(encoded)
    return time.process_time() - started


@pytest.mark.benchmark(group=f"decode, RandomResizedCrop {SIZE} and flip, {COUNT} images")
@pytest.mark.parametrize("images", ["originals", "prepared"])
def test_crops(benchmark, originals, images, request):
    """Print images per CPU second, and their ratio to torchvision on the originals."""
    chosen = request.getfixturevalue(images)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    theirs: list[float] = []
    ours: list[float] = []
    benchmark.pedantic(
        lambda: ours.append(seconds(kdbench_crop, chosen)),
        setup=lambda: theirs.append(seconds(torchvision_crop, originals)),
        rounds=ROUNDS,
    )
    torch.set_num_threads(before)
    ratios = [their / our for their, our in zip(theirs, ours, strict=True)]
    benchmark.extra_info |= {
        "images/s of a core": COUNT / statistics.median(ours),
        "torchvision images/s of a core": COUNT / statistics.median(theirs),
        "ratio": statistics.median(ratios),
        "ratio, least and most": (min(ratios), max(ratios)),
    }
