"""Sources of encoded images: layouts, selection of images, and errors."""

import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_data
import torch
from encoded_data import LAYOUTS, content, opened, photo_suite, write_folders, write_parquet
from huggingface_hub.errors import GatedRepoError
from tiny_data import unreachable_hub  # noqa: F401

from kdbench.data import locate
from kdbench.data.encoded.images import EncodedImages
from kdbench.data.prepare.manifest import Manifest, Originals, Settings, write_manifest
from kdbench.errors import UserError
from kdbench.suite.suite import Suite

pytestmark = pytest.mark.usefixtures("unreachable_hub")


@pytest.fixture
def suite() -> Suite:
    return photo_suite()


def pairs(images: EncodedImages) -> list[tuple[bytes, int]]:
    return [(images.read(i), label) for i, label in enumerate(images.labels.tolist())]


def with_data(suite: Suite, **changes) -> Suite:
    return suite.model_copy(update={"data": suite.data.model_copy(update=changes)})


def complaint(suite: Suite, folder: Path | None) -> str:
    return tiny_data.complaint(suite.data, folder, lambda _, folder: opened(suite, folder))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", ["", "photos"])
def test_every_layout_gives_the_bytes_as_they_are(suite, layout, place):
    LAYOUTS[layout](Path("root") / place)
    assert locate(suite.data, Path("root")).layout == layout
    for images, expected in zip(opened(suite, Path("root")), content().values(), strict=True):
        found = pairs(images)
        if layout == "imagefolder":  # class after class
            expected = sorted(expected, key=lambda row: row[1])
        assert found == expected
        assert str(Path("root").absolute()) not in images.name(0)


def test_the_classes_of_a_folder_go_by_their_names(suite):
    folder = write_folders(Path("root"))
    (folder / "val").rename(folder / "validation")
    for split in ("train", "validation"):
        (folder / split / "n00000002").rename(folder / split / "m")
    (folder / "train/m/Thumbs.db").write_bytes(b"no image")
    train, _ = opened(suite, folder)
    assert train.name(0).startswith("train: m/")
    assert torch.bincount(train.labels).tolist() == [5] * 4


def test_the_copy_of_parquet_is_cached_once(suite, monkeypatch, tmp_path):
    monkeypatch.setenv("KDBENCH_CACHE", str(tmp_path))
    folder = write_parquet(Path("root"))
    before = [pairs(images) for images in opened(suite, folder)]
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.arrow")}
    assert files
    again = opened(suite, folder)
    assert [pairs(images) for images in again] == before
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.arrow")} == files
    assert {Path(file) for file in again[0].reader.files} <= files.keys()


def test_pixels_that_were_prepared_are_noted_as_such(suite):
    folder = write_parquet(Path("root"))
    assert opened(suite, folder)[0].notes["images"] == "originals"
    originals = Originals(data="photos", layout="parquet", files=3, bytes=9, splits={"train": 20})
    settings = Settings(shorter_side=36, quality=90, images_per_shard=10)
    write_manifest(folder, Manifest(made_by="", originals=originals, settings=settings, shards={}))
    for images in opened(suite, folder):
        assert images.notes["images"] == "prepared: shorter side 36, JPEG quality 90"
    with pytest.raises(UserError, match="shorter side of 36 pixels, but the suite evaluates at 37"):
        opened(with_data(suite, resize=37), folder)


def test_every_nth_class_is_taken_and_renumbered_in_order(suite):
    folder = LAYOUTS["save_to_disk"](Path("root"))
    train = suite.data.train.model_copy(update={"per_class": 3})
    test = suite.data.test.model_copy(update={"per_class": 2})
    chosen = with_data(suite, train=train, test=test, classes=2, class_stride=2)
    for images, rows, count in zip(opened(chosen, folder), content().values(), (3, 2), strict=True):
        expected = [row for label in (0, 2) for row in [r for r in rows if r[1] == label][:count]]
        assert sorted(pairs(images)) == sorted((image, label // 2) for image, label in expected)
        assert images.rows.tolist() == sorted(images.rows.tolist())


def test_a_class_with_too_few_images_is_refused(suite):
    folder = LAYOUTS["save_to_disk"](Path("root"))
    three = with_data(
        suite, test=suite.data.test.model_copy(update={"per_class": 3})
    )  # classes 2, 3 have two
    assert "a class of 'validation' has fewer than 3 images" in complaint(three, folder)
    assert "label 3 is not in 0 to 2" in complaint(with_data(three, classes=3), folder)


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        ("rm -r val", "incomplete: folder val is missing"),
        ("rm -r train", "incomplete: folder train is missing"),
        ("rm -r train val", "not found in .*folders 'train' and 'val' with"),
        ("rm -r val/n00000003", "'val' has 3 class folders instead of 4"),
        (
            "mv val/*/* val; rmdir val/*/",  # as in the archive of the challenge
            "'val' has 0 class folders instead of 4; sort the images into one folder per class",
        ),
        ("rm train/n00000002/n00000002_006.JPEG", "'train' has 19 images instead of 20"),
        ("cd train/n00000001; for f in *; do mv $f $f.txt; done", "'train' has 15 images instead"),
        ("mv train/n00000001/* train/n00000002", "'train' has no image of class 1 of 4"),
    ],
)
def test_a_folder_of_other_images_is_refused_with_its_cause(suite, damage, cause):
    folder = write_folders(Path("root"))
    subprocess.run(damage, shell=True, check=True, cwd=folder)
    assert re.search(cause, complaint(suite, folder))


@pytest.mark.parametrize(
    ("column", "value", "cause"),
    [
        ("label", pa.scalar(9), "label 9 is not in 0 to 3"),
        ("label", pa.scalar("a"), "'label' does not contain integer class labels"),
        ("label", pa.scalar(None, pa.int64()), "'label' does not contain integer class labels"),
        ("image", pa.scalar(b"x"), "'image' does not contain encoded images"),
    ],
)
def test_parquet_of_other_content_is_refused_with_its_cause(suite, column, value, cause):
    folder = write_parquet(Path("root"))
    for file in folder.glob("train-*"):
        rows = pq.read_table(file)
        values = pa.repeat(value, len(rows))
        pq.write_table(rows.set_column(rows.column_names.index(column), column, values), file)
    assert cause in complaint(suite, folder)


def test_a_gated_data_set_says_how_to_get_access_and_is_read_with_it(suite, monkeypatch):
    hub, asked = huggingface_hub.HfApi, []

    def gated(_api, name, **_options):
        asked.append(name)
        raise GatedRepoError.__new__(GatedRepoError)  # how it is made depends on the hub's version

    monkeypatch.setattr(hub, "dataset_info", lambda *_a, **_o: SimpleNamespace(gated="auto"))
    monkeypatch.setattr(hub, "auth_check", gated)
    message = complaint(suite, None)
    assert asked == ["nobody/photos"]
    page = "https://huggingface.co/datasets/nobody/photos"
    for words in (page, "hf auth login", "HF_TOKEN", "--data-dir"):
        assert words in message
    saved = datasets.load_from_disk(str(LAYOUTS["save_to_disk"](Path("root"))))
    monkeypatch.setattr(hub, "auth_check", lambda *_a, **_o: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: saved[split])
    assert pairs(opened(suite, None)[0]) == content()["train"]
