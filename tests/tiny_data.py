"""A dataset of 40 training and 20 test images in every layout, with the expected tensors."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from unittest.mock import Mock

import datasets
import encoded_data
import huggingface_hub
import pytest
import torch
from encoded_data import Content, table
from pictures import encode
from PIL import Image

from kdbench.data import Images, load_images, locate
from kdbench.errors import UserError
from kdbench.suite.load import load_suite
from kdbench.suite.sections import Data, Split

FIRST, SECOND = (f"train-0000{shard}-of-00002.parquet" for shard in (0, 1))
TEST = "test-00000-of-00001.parquet"


TINY = load_suite("digits").data.model_copy(
    update={
        "name": "tiny",
        "embedded": None,
        "hub": "nobody/nothing",
        "train": Split(split="train", images=40),
        "test": Split(split="test", images=20),
    }
)


@cache
def expected() -> tuple[Images, Images]:
    """Return noise whose labels cycle through the classes; the test images are gray."""
    noise = torch.randint(256, (60, 8, 8, 3), generator=torch.Generator().manual_seed(0)).byte()
    gray = noise[40:, ..., :1].expand(-1, -1, -1, 3)
    return Images(noise[:40], torch.arange(40) % 10), Images(gray, torch.arange(20) % 10)


@cache
def content() -> Content:
    """Return the images as PNG files in color or gray, and the labels, of each split."""
    rows = {}
    for split, mode, images in zip(("train", "test"), ("RGB", "L"), expected(), strict=True):
        pictures = [Image.fromarray(pixels).convert(mode) for pixels in images.pixels.numpy()]
        encoded = [encode(picture, "PNG") for picture in pictures]
        rows[split] = list(zip(encoded, images.labels.tolist(), strict=True))
    return rows


def write_parquet(folder: Path) -> Path:
    return encoded_data.write_parquet(folder, content())


def write_saved(folder: Path) -> Path:
    """Write the layout of `save_to_disk` of the `datasets` library."""
    splits = {split: datasets.Dataset(table(rows)) for split, rows in content().items()}
    saved = datasets.DatasetDict(splits).cast_column("image", datasets.Image())
    saved.save_to_disk(folder)
    return folder


def load(data: Data, folder: Path | None = None) -> tuple[Images, Images]:
    source = locate(data, folder)
    return load_images(source, data.train), load_images(source, data.test)


def complaint(data: Data, folder: Path | None = None, load: Callable = load) -> str:
    """Return the message of the UserError: one sentence that names the dataset."""
    with pytest.raises(UserError) as caught:
        load(data, folder)
    message = str(caught.value)
    assert "\n" not in message and message.endswith(".") and not message.endswith("..")
    assert f"'{data.name}'" in message
    return message


@pytest.fixture
def unreachable_hub(monkeypatch):
    """Unset the data folder and make the hub never answer."""
    silent = Mock(side_effect=ConnectionError("Name or service not known"))
    monkeypatch.delenv("KDBENCH_DATA", raising=False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", silent)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
