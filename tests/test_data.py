"""Locating a dataset, and the errors if it is missing, corrupt or another one."""

import hashlib
import logging
import os
import pickle
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torchvision
from tiny_data import (
    FIRST,
    SECOND,
    TEST,
    TINY,
    changed,
    changed_train,
    complaint,
    expected,
    load,
    on_the_hub,
    same,
    unreachable_hub,  # noqa: F401
    write_parquet,
    write_saved,
)

from kdbench.data import Source, is_cached, load_images, locate
from kdbench.suite.sections import Split

pytestmark = pytest.mark.usefixtures("unreachable_hub")
OPEN = SimpleNamespace(gated=False)
CIFAR_LIKE = changed(
    TINY,
    torchvision="CIFAR100",
    image_size=32,
    train=Split(split="train", images=20),
    test=Split(split="test", images=10),
)


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KDBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def write_original(monkeypatch):
    """Return a function that writes torchvision's layout and registers its MD5 sums."""

    def write(folder: Path) -> dict[str, np.ndarray]:
        folder.mkdir(parents=True)
        sums, content = {}, {}
        for name, count in (("train", 20), ("test", 10), ("meta", 0)):
            pixels = np.random.default_rng(count).integers(0, 256, (count, 3072), dtype=np.uint8)
            content[name] = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
            labels = [row % 10 for row in range(count)]
            entry = {"data": pixels, "fine_labels": labels, "fine_label_names": []}
            (folder / name).write_bytes(pickle.dumps(entry))
            sums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
        reader = torchvision.datasets.CIFAR100
        monkeypatch.setattr(reader, "train_list", [["train", sums["train"]]])
        monkeypatch.setattr(reader, "test_list", [["test", sums["test"]]])
        monkeypatch.setattr(reader, "meta", reader.meta | {"md5": sums["meta"]})
        return content

    return write


@pytest.fixture
def library_log():
    """Records that the `datasets` library logs."""
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("datasets").addHandler(handler)
    yield records
    logging.getLogger("datasets").removeHandler(handler)


@pytest.mark.parametrize(
    ("layout", "write"), [("parquet", write_parquet), ("save_to_disk", write_saved)]
)
@pytest.mark.parametrize("place", ["", "tiny", "data"])
def test_both_layouts_are_found_in_the_folder_or_a_subfolder(tmp_path, layout, write, place):
    folder = write(tmp_path / "root" / place)
    assert locate(TINY, tmp_path / "root") == Source(TINY, layout, folder)
    assert same(load(TINY, tmp_path / "root"), expected())


@pytest.mark.parametrize("below", [".", "tiny", "itself"])
def test_torchvisions_folder_is_read_if_its_checksums_match(write_original, tmp_path, below):
    named = tmp_path / "cifar-100-python" if below == "itself" else tmp_path / "root"
    folder = named if below == "itself" else named / below / "cifar-100-python"
    content = write_original(folder)
    assert locate(CIFAR_LIKE, named) == Source(CIFAR_LIKE, "torchvision", folder)
    for split, images in zip(("train", "test"), load(CIFAR_LIKE, named), strict=True):
        assert np.array_equal(images.pixels, content[split])
        assert images.labels.tolist() == [row % 10 for row in range(len(images))]


@pytest.mark.parametrize("damaged", ["train", "test", "meta", "all"])
def test_torchvisions_folder_with_wrong_checksums_is_refused(write_original, tmp_path, damaged):
    folder = tmp_path / "cifar-100-python"
    write_original(folder)
    if damaged == "all":
        shutil.rmtree(folder)
        folder.mkdir()
    else:
        (folder / damaged).write_bytes((folder / damaged).read_bytes() + b" ")
    assert "do not match the published checksums" in complaint(CIFAR_LIKE, tmp_path)


def test_the_hub_is_used_only_if_no_folder_is_given(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        huggingface_hub.HfApi, "dataset_info", lambda _, name, **__: asked.append(name) or OPEN
    )
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: on_the_hub()[split])
    assert locate(TINY, None) == Source(TINY, "hub")
    assert asked == ["nobody/nothing"]
    assert same(load(TINY), expected())
    asked.clear()
    monkeypatch.setenv("KDBENCH_DATA", str(write_parquet(tmp_path / "data")))
    assert locate(TINY, None).layout == "parquet" and not asked


def test_images_cached_from_the_hub_need_no_network(monkeypatch):
    with monkeypatch.context() as online:
        online.setattr(huggingface_hub.HfApi, "dataset_info", lambda _, name, **__: OPEN)
        online.setattr(datasets, "load_dataset", lambda name, split: on_the_hub()[split])
        assert not is_cached(locate(TINY, None))
        load(TINY)
    source = locate(TINY, None, is_cached)
    assert source == Source(TINY, "hub")
    assert len(load_images(source, TINY.train)) == 40
    assert "did not answer" in complaint(TINY)


def test_the_option_overrides_the_environment_variable(tmp_path, monkeypatch):
    first, second = write_parquet(tmp_path / "first"), write_parquet(tmp_path / "second")
    monkeypatch.setenv("KDBENCH_DATA", str(first))
    assert locate(TINY, None).folder == first
    assert locate(TINY, second).folder == second
    monkeypatch.setenv("KDBENCH_DATA", str(tmp_path / "gone"))
    assert locate(TINY, second).folder == second
    assert "gone' does not exist" in complaint(TINY)


def test_no_copy_and_no_network_fails_at_once():
    start = time.monotonic()
    message = complaint(changed(TINY, torchvision="CIFAR100"))
    assert time.monotonic() - start < 5
    for word in ("--data-dir", "KDBENCH_DATA", "nobody/nothing", "Name or service not known"):
        assert word in message
    for layout in ("train-*.parquet", "save_to_disk", "cifar-100-python"):
        assert layout in message
    assert "is not on the hub" in complaint(changed(TINY, hub=None))


def test_offline_mode_without_a_copy_explains_the_layouts(monkeypatch):
    def offline(*_args, **_options):
        raise ConnectionError("offline mode is enabled")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets, "load_dataset", offline)
    message = complaint(TINY)
    assert "offline mode is enabled" in message and "save_to_disk" in message


def column(name: str, change):
    """Return a function that changes every value of a column of the training split."""

    def damage(folder: Path):
        for file in folder.glob("train-*"):
            rows = pq.read_table(file).replace_schema_metadata(None)
            values = pa.array([change(value) for value in rows[name].to_pylist()])
            pq.write_table(rows.set_column(rows.column_names.index(name), name, values), file)

    return damage


def second(change):
    """Return a function that changes the second training file."""
    return lambda folder: pq.write_table(change(pq.read_table(folder / SECOND)), folder / SECOND)


def without(*names: str):
    return lambda folder: [(folder / name).unlink() for name in names]


def written(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


def dangling(folder: Path):
    (folder / TEST).unlink()
    (folder / "test-00000-of-00001-ab.parquet").symlink_to(folder / "gone")


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (
            without(TEST, FIRST, SECOND),
            "not found in .*Name a folder with --data-dir or KDBENCH_DATA",
        ),
        (shutil.rmtree, "does not exist"),
        (lambda folder: [shutil.rmtree(folder), folder.write_text("")], "is not a folder"),
        (without(SECOND), "train-00001-of-00002.parquet is missing; copy the folder again"),
        (without(FIRST), "train-00000-of-00002.parquet is missing"),
        (without(TEST), r"test-\*.parquet is missing"),
        (without(FIRST, SECOND), r"train-\*.parquet is missing"),
        (dangling, r"test-\*.parquet is missing"),
        (
            lambda folder: os.truncate(folder / FIRST, 0),
            "'train' split .*cannot be read: .*0 bytes",
        ),
        (
            lambda folder: os.truncate(folder / TEST, 1500),
            "'test' split .* cannot be read: .*magic",
        ),
        (second(lambda rows: rows.slice(0, 3)), "'train' has 28 images instead of 40"),
        (
            second(lambda rows: rows.rename_columns(["image", "x"])),
            "cannot be read: .*column names",
        ),
        (column("label", lambda label: label + 1), "the label 10 is not one of the classes 0 to 9"),
        (column("label", lambda label: label - 1), "the label -1 is not one"),
        (column("label", lambda label: label // 2), "'train' has no image of class 5 of 10"),
        (column("label", lambda label: f"a {label}"), "the label 'a .' is not one"),
        (column("label", lambda label: [label]), "the label .* is not one"),
        (column("label", lambda label: label + 0.5), "the label .*5 is not one"),
        (column("label", lambda label: None), "the label None is not one"),
        (column("image", lambda image: image["bytes"]), "'image' does not contain encoded images"),
        (column("image", lambda image: {"bytes": b"x"}), "Image 0 .*decoded: it is in no known"),
        (column("image", lambda image: {"bytes": image["bytes"][:-30]}), "Image 0 .*truncated"),
    ],
)
def test_a_damaged_folder_is_refused_with_its_cause(tmp_path, library_log, damage, cause):
    folder = write_parquet(tmp_path / "data")
    damage(folder)
    assert re.search(cause, complaint(TINY, folder))
    assert library_log == []


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda folder: shutil.rmtree(folder / "train"), "'train' split .*cannot be read: No such"),
        (lambda folder: os.truncate(next(folder.glob("train/*.arrow")), 900), "cannot be read"),
        (lambda folder: next(folder.glob("train/*.arrow")).unlink(), "cannot be read: .*No such"),
        (without("train/state.json"), "cannot be read: .*state.json"),
        (written("train/dataset_info.json", '{"features": 3}'), "content is damaged"),
        (written("dataset_dict.json", "{"), "cannot be read"),
        (written("dataset_dict.json", "[]"), "content is damaged"),
        (written("dataset_dict.json", '{"splits": ["test"]}'), r"no such split \(splits: test\)"),
    ],
)
def test_a_damaged_saved_dataset_is_refused_with_its_cause(tmp_path, damage, cause):
    folder = write_saved(tmp_path / "data")
    damage(folder)
    assert re.search(cause, complaint(TINY, folder))


@pytest.mark.parametrize(
    ("data", "cause"),
    [
        (changed(TINY, label_column="fine"), "it has no column 'fine' (columns: image, label)"),
        (changed(TINY, image_size=32), "an image is 8x8 pixels, not 32x32"),
        (changed(TINY, classes=11), "'train' has no image of class 10 of 11"),
        (changed_train(TINY, images=41), "'train' has 40 images instead of 41"),
        (changed_train(TINY, sha256="0" * 64), "the pixels of 'train' have a different checksum"),
        (changed_train(TINY, per_class=5), "a class of 'train' has fewer than 5 images"),
    ],
)
def test_another_data_set_is_refused_with_its_cause(tmp_path, data, cause):
    folder = write_parquet(tmp_path / "data")
    assert f"does not match 'tiny': {cause}." in complaint(data, folder)
    load(TINY, folder)  # what is cached now must not hide it
    assert f"does not match 'tiny': {cause}." in complaint(data, folder)


def test_a_folder_the_system_cannot_open_is_refused():
    assert "cannot be read: File name too long" in complaint(TINY, Path("x" * 300))
