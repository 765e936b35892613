"""A dataset of 40 training and 20 test images in every layout, with the expected tensors."""

from collections.abc import Callable
from functools import cache
from io import BytesIO
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from kdbench.data import Images, load_images, locate
from kdbench.errors import UserError
from kdbench.paths import SUITES
from kdbench.suite.load import load_suite
from kdbench.suite.sections import Data, Split

DIGITS = load_suite("digits").data
# The first 4 training and 2 test images of each digit, as if they were on the hub.
TINY = DIGITS.model_copy(
    update={
        "name": "tiny",
        "embedded": None,
        "hub": "nobody/nothing",
        "train": Split(split="train", images=40),
        "test": Split(split="test", images=20),
    }
)
PER_CLASS = {"train": 4, "test": 2}
FIRST, SECOND = (f"train-0000{shard}-of-00002.parquet" for shard in (0, 1))
TEST = "test-00000-of-00001.parquet"


def changed(data: Data, **changes) -> Data:
    return data.model_copy(update=changes)


def changed_train(data: Data, **changes) -> Data:
    return changed(data, train=data.train.model_copy(update=changes))


@cache
def table(split: str) -> pa.Table:
    whole = pq.read_table(Path(SUITES, "digits", f"{split}-00000-of-00001.parquet"))
    labels = np.asarray(whole["label"])
    of_class = [np.flatnonzero(labels == digit)[: PER_CLASS[split]] for digit in range(10)]
    return whole.take(np.sort(np.concatenate(of_class)))


def write_parquet(folder: Path) -> Path:
    """Write the hub's layout, with the training split in two files."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table("train").slice(0, 25), folder / FIRST)
    pq.write_table(table("train").slice(25), folder / SECOND)
    pq.write_table(table("test"), folder / TEST)
    return folder


def on_the_hub() -> datasets.DatasetDict:
    return datasets.DatasetDict({split: datasets.Dataset(table(split)) for split in PER_CLASS})


def write_saved(folder: Path) -> Path:
    """Write the layout of `save_to_disk` of the `datasets` library."""
    on_the_hub().cast_column("image", datasets.Image()).save_to_disk(folder)
    return folder


def load(data: Data, folder: Path | None = None) -> tuple[Images, Images]:
    source = locate(data, folder)
    return load_images(source, data.train), load_images(source, data.test)


@cache
def expected() -> tuple[Images, Images]:
    """Load the same images without kdbench."""
    parts = []
    for split in PER_CLASS:
        rows = table(split).to_pylist()
        pixels = [Image.open(BytesIO(row["image"]["bytes"])).convert("RGB") for row in rows]
        labels = torch.tensor([row["label"] for row in rows])
        parts.append(Images(torch.from_numpy(np.stack(list(map(np.array, pixels)))), labels))
    return parts[0], parts[1]


def same(left: tuple[Images, ...], right: tuple[Images, ...]) -> bool:
    return all(
        torch.equal(one.pixels, other.pixels) and torch.equal(one.labels, other.labels)
        for one, other in zip(left, right, strict=True)
    )


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

    def silent(*_args, **_options):
        raise ConnectionError("Name or service not known")

    monkeypatch.delenv("KDBENCH_DATA", raising=False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", silent)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
