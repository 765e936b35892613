"""Sources of encoded images: layouts, selection of images, and errors."""

import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_data
import torch
from encoded_data import (
    CLASSES,
    LAYOUTS,
    content,
    opened,
    photo_suite,
    write_folders,
    write_parquet,
    write_saved,
)
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
    folder = write_folders(Path("root"), validation="validation")
    (folder / "train" / "n00000002").rename(folder / "train" / "m")
    (folder / "validation" / "n00000002").rename(folder / "validation" / "m")
    (folder / "train" / "m" / "Thumbs.db").write_bytes(b"no image")
    train, _ = opened(suite, folder)
    assert train.name(0).startswith("train: m/")
    assert torch.bincount(train.labels).tolist() == [5] * CLASSES


def test_the_copy_of_parquet_is_cached_once(suite, monkeypatch, tmp_path):
    monkeypatch.setenv("KDBENCH_CACHE", str(tmp_path))
    folder = write_parquet(Path("root"))
    before = [pairs(images) for images in opened(suite, folder)]
    files = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.arrow")}
    assert files
    assert [pairs(images) for images in opened(suite, folder)] == before
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.arrow")} == files
    reader = opened(suite, folder)[0].reader
    assert {Path(file) for file in reader.files} <= files.keys()


def test_pixels_that_were_prepared_are_noted_as_such(suite):
    folder = write_parquet(Path("root"))
    assert opened(suite, folder)[0].notes["images"] == "originals"
    splits = {"train": 20, "validation": 10}
    originals = Originals(data="photos", layout="parquet", files=3, bytes=9, splits=splits)
    settings = Settings(shorter_side=36, quality=90, images_per_shard=10)
    manifest = Manifest(made_by="a test", originals=originals, settings=settings, shards={})
    write_manifest(folder, manifest)
    for images in opened(suite, folder):
        assert images.notes["images"] == "prepared: shorter side 36, JPEG quality 90"
    data = suite.data.model_copy(update={"resize": 37})
    with pytest.raises(UserError, match="shorter side of 36 pixels, but the suite evaluates at 37"):
        opened(suite.model_copy(update={"data": data}), folder)


def test_every_nth_class_is_taken_and_renumbered_in_order(suite):
    folder = write_saved(Path("root"))
    train = suite.data.train.model_copy(update={"per_class": 3})
    test = suite.data.test.model_copy(update={"per_class": 2})
    changes = {"train": train, "test": test, "classes": 2, "class_stride": 2}
    chosen = suite.model_copy(update={"data": suite.data.model_copy(update=changes)})
    for images, rows, count in zip(opened(chosen, folder), content().values(), (3, 2), strict=True):
        expected = [row for label in (0, 2) for row in [r for r in rows if r[1] == label][:count]]
        assert sorted(pairs(images)) == sorted((image, label // 2) for image, label in expected)
        assert images.rows.tolist() == sorted(images.rows.tolist())


def test_a_class_with_too_few_images_is_refused(suite):
    test = suite.data.test.model_copy(update={"per_class": 3})  # classes 2 and 3 have two
    data = suite.data.model_copy(update={"test": test, "classes": 3})
    folder = write_saved(Path("root"))
    assert "label 3 is not in 0 to 2" in complaint(suite.model_copy(update={"data": data}), folder)
    data = data.model_copy(update={"classes": CLASSES})
    message = complaint(suite.model_copy(update={"data": data}), folder)
    assert "a class of 'validation' has fewer than 3 images" in message


def flat(folder: Path) -> None:
    """The validation images as the archive of the challenge has them."""
    for file in list((folder / "val").glob("*/*")):
        file.rename(folder / "val" / file.name)
        if not any(file.parent.iterdir()):
            file.parent.rmdir()


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda f: shutil.rmtree(f / "val"), "incomplete: folder val is missing"),
        (lambda f: shutil.rmtree(f / "train"), "incomplete: folder train is missing"),
        (shutil.rmtree, "does not exist"),
        (lambda f: (shutil.rmtree(f), f.mkdir()), "not found in .*folders 'train' and 'val' with"),
        (lambda f: shutil.rmtree(f / "val/n00000003"), "'val' has 3 class folders instead of 4"),
        (flat, "'val' has 0 class folders instead of 4; sort the images into one folder per class"),
        (lambda f: next(f.glob("train/*/*")).unlink(), "'train' has 19 images instead of 20"),
        (
            lambda f: [p.rename(p.with_suffix(".txt")) for p in f.glob("train/n00000001/*")],
            "'train' has 15 images instead of 20",
        ),
    ],
)
def test_a_folder_of_other_images_is_refused_with_its_cause(suite, damage, cause):
    folder = write_folders(Path("root"))
    damage(folder)
    assert re.search(cause, complaint(suite, folder))


def test_a_class_without_images_is_refused(suite):
    folder = write_folders(Path("root"))
    for file in list(folder.glob("train/n00000001/*")):
        file.rename(folder / "train/n00000002" / file.name)
    assert "'train' has no image of class 1 of 4" in complaint(suite, folder)


def column(name: str, values):
    """Damage: a column of the training split is another."""

    def damage(folder: Path) -> None:
        for file in folder.glob("train-*"):
            rows = pq.read_table(file)
            new = values(rows)
            pq.write_table(rows.set_column(rows.column_names.index(name), name, new), file)

    return damage


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda f: (f / "train-00001-of-00002.parquet").unlink(), "train-00001-of-00002.parquet"),
        (column("label", lambda t: pa.array([9] * len(t))), "label 9 is not in 0 to 3"),
        (
            column("label", lambda t: pa.array(["a"] * len(t))),
            "'label' does not contain integer class labels",
        ),
        (
            column("label", lambda t: pa.nulls(len(t), pa.int64())),
            "'label' does not contain integer class labels",
        ),
        (
            column("image", lambda t: pa.array([b"x"] * len(t))),
            "'image' does not contain encoded images",
        ),
    ],
)
def test_parquet_of_other_content_is_refused_with_its_cause(suite, damage, cause):
    folder = write_parquet(Path("root"))
    damage(folder)
    assert cause in complaint(suite, folder)


def test_a_gated_data_set_says_how_to_get_access(suite, monkeypatch):
    asked = []

    def gated(_api, name, **_options):
        asked.append(name)
        raise GatedRepoError.__new__(GatedRepoError)  # how it is made depends on the hub's version

    info = SimpleNamespace(gated="auto")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_a, **_o: info)
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", gated)
    message = complaint(suite, None)
    assert asked == ["nobody/photos"]
    for words in ("https://huggingface.co/datasets/nobody/photos", "hf auth login", "HF_TOKEN"):
        assert words in message
    assert "--data-dir" in message


def test_the_hub_is_read_where_access_is_granted(suite, monkeypatch):
    saved = datasets.load_from_disk(str(write_saved(Path("root"))))
    info = SimpleNamespace(gated="auto")
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", lambda *_a, **_o: info)
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", lambda *_a, **_o: None)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: saved[split])
    train, _ = opened(suite, None)
    assert pairs(train) == content()["train"]
