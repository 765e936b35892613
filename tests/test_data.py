"""Images in memory: where a dataset is found, its errors, the cache, subsets and real CIFAR-100."""

import hashlib
import io
import logging
import os
import pickle
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import datasets
import huggingface_hub
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from tiny_data import (
    FIRST,
    SECOND,
    TEST,
    TINY,
    complaint,
    expected,
    load,
    unreachable_hub,  # noqa: F401
    write_parquet,
    write_saved,
)

from kdbench.data import Images, Source, is_cached, load_images, locate
from kdbench.data.decoded.images import cache_folder
from kdbench.suite.load import load_suite

REAL = Path(os.environ.get("KDBENCH_DATA") or "none").absolute()  # tests change the working folder
CIFAR_LIKE = TINY.model_copy(update={"torchvision": "CIFAR100", "image_size": 32})
LAYOUTS = {"parquet": write_parquet, "save_to_disk": write_saved}
pytestmark = pytest.mark.usefixtures("unreachable_hub")


def changed(part, **changes):
    return part.model_copy(update=changes)


def changed_train(data, **changes):
    return changed(data, train=changed(data.train, **changes))


def same(left: tuple[Images, ...], right: tuple[Images, ...]) -> bool:
    return all(
        torch.equal(one.pixels, other.pixels) and torch.equal(one.labels, other.labels)
        for one, other in zip(left, right, strict=True)
    )


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KDBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder() -> Path:
    return write_parquet(Path("data"))


def write_original(folder: Path, monkeypatch) -> tuple[Images, ...]:
    """Write torchvision's layout and register its MD5 sums."""
    folder.mkdir(parents=True)
    reader, splits = torchvision.datasets.CIFAR100, []
    for name, count in (("train", 40), ("test", 20)):
        pixels, labels = torch.randint(256, (count, 3, 32, 32)).byte(), torch.arange(count) % 10
        content = {"data": pixels.flatten(1).numpy(), "fine_labels": labels.tolist()}
        (folder / name).write_bytes(pickle.dumps(content))
        splits.append(Images(pixels.permute(0, 2, 3, 1), labels))
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": []}))
    sums = {f.name: hashlib.md5(f.read_bytes()).hexdigest() for f in folder.iterdir()}
    monkeypatch.setattr(reader, "train_list", [["train", sums["train"]]])
    monkeypatch.setattr(reader, "test_list", [["test", sums["test"]]])
    monkeypatch.setattr(reader, "meta", reader.meta | {"md5": sums["meta"]})
    return tuple(splits)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", ["", "tiny", "data"])
def test_both_layouts_are_found_in_the_folder_or_a_subfolder(layout, place):
    root = Path("root")
    folder = LAYOUTS[layout](root / place)
    assert locate(TINY, root) == Source(TINY, layout, folder)
    assert same(load(TINY, root), expected())


@pytest.mark.parametrize(("named", "place"), [("", ""), ("", "tiny"), ("cifar-100-python", "")])
def test_torchvisions_folder_is_read_if_its_checksums_match(tmp_path, monkeypatch, named, place):
    folder = tmp_path / place / "cifar-100-python"
    content = write_original(folder, monkeypatch)
    assert locate(CIFAR_LIKE, tmp_path / named) == Source(CIFAR_LIKE, "torchvision", folder)
    assert same(load(CIFAR_LIKE, tmp_path / named), content)


@pytest.mark.parametrize("damaged", ["train", "test", "meta", "all"])
def test_torchvisions_folder_with_wrong_checksums_is_refused(monkeypatch, damaged):
    folder = Path("root/cifar-100-python")
    write_original(folder, monkeypatch)
    for file in folder.iterdir():
        if damaged == "all":
            file.unlink()
        elif damaged == file.name:
            file.write_bytes(file.read_bytes() + b" ")
    assert "do not match the published checksums" in complaint(CIFAR_LIKE, Path("root"))


def test_the_hub_is_used_once_and_only_if_no_folder_is_given(folder, monkeypatch):
    saved = datasets.load_from_disk(write_saved(Path("saved")))
    asked = Mock(return_value=SimpleNamespace(gated=False))
    with monkeypatch.context() as hub:
        hub.setattr(huggingface_hub.HfApi, "dataset_info", asked)
        hub.setattr(datasets, "load_dataset", lambda name, split: saved[split])
        assert locate(TINY, None) == Source(TINY, "hub")
        assert asked.call_args.args == ("nobody/nothing",)
        assert not is_cached(locate(TINY, None))
        assert same(load(TINY), expected())
        asked.reset_mock()
        hub.setenv("KDBENCH_DATA", str(folder))
        assert locate(TINY, None).layout == "parquet" and not asked.called
    source = locate(TINY, None, is_cached)
    assert source == Source(TINY, "hub")
    assert len(load_images(source, TINY.train)) == 40
    assert "did not answer" in complaint(TINY)


def test_the_option_overrides_the_environment_variable(folder, monkeypatch):
    other = write_parquet(Path("other"))
    monkeypatch.setenv("KDBENCH_DATA", str(other))
    assert locate(TINY, None).folder == other
    assert locate(TINY, folder).folder == folder
    for named, words in (("gone", "'gone' does not exist"), ("x" * 300, "File name too long")):
        monkeypatch.setenv("KDBENCH_DATA", named)
        assert locate(TINY, folder).folder == folder
        assert words in complaint(TINY)


def test_no_copy_and_no_network_or_offline_mode_fails_at_once(monkeypatch):
    start = time.monotonic()
    message = complaint(changed(TINY, torchvision="CIFAR100"))
    assert time.monotonic() - start < 5
    remedies = "--data-dir", "KDBENCH_DATA", "train-*.parquet", "save_to_disk", "cifar-100-python"
    for words in (*remedies, "nobody/nothing", "Name or service not known"):
        assert words in message
    assert "is not on the hub" in complaint(changed(TINY, hub=None))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    offline = Mock(side_effect=ConnectionError("offline mode is enabled"))
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


def truncated(pattern: str, size: int):
    return lambda folder: os.truncate(next(folder.glob(pattern)), size)


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (without(TEST, FIRST, SECOND), "not found in .*--data-dir or KDBENCH_DATA"),
        (shutil.rmtree, "does not exist"),
        (lambda folder: [shutil.rmtree(folder), folder.write_text("")], "is not a folder"),
        (without(SECOND), "train-00001-of-00002.parquet is missing; copy the folder again"),
        (without(FIRST), "train-00000-of-00002.parquet is missing"),
        (without(TEST), r"test-\*.parquet is missing"),
        (without(FIRST, SECOND), r"train-\*.parquet is missing"),
        (
            lambda f: [(f / TEST).unlink(), (f / TEST).symlink_to("gone")],
            r"test-\*.parquet is missing",
        ),
        (truncated(FIRST, 0), "'train' split .*cannot be read: .*0 bytes"),
        (truncated(TEST, 1500), "'test' split .* cannot be read: .*magic"),
        (second(lambda rows: rows.slice(0, 3)), "'train' has 23 images instead of 40"),
        (second(lambda rows: rows.rename_columns(["image", "x"])), "read: .*column names"),
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
def test_a_damaged_folder_is_refused_with_its_cause(folder, monkeypatch, caplog, damage, cause):
    damage(folder)
    monkeypatch.setattr(logging.getLogger("datasets"), "propagate", True)
    assert re.search(cause, complaint(TINY, folder))
    assert caplog.records == []


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda folder: shutil.rmtree(folder / "train"), "'train' split .*cannot be read: No such"),
        (truncated("train/*.arrow", 900), "cannot be read"),
        (lambda folder: next(folder.glob("train/*.arrow")).unlink(), "cannot be read: .*No such"),
        (without("train/state.json"), "cannot be read: .*state.json"),
        (written("train/dataset_info.json", '{"features": 3}'), "content is damaged"),
        (written("dataset_dict.json", "{"), "cannot be read"),
        (written("dataset_dict.json", "[]"), "content is damaged"),
        (written("dataset_dict.json", '{"splits": ["test"]}'), r"no such split \(splits: test\)"),
    ],
)
def test_a_damaged_saved_dataset_is_refused_with_its_cause(damage, cause):
    folder = write_saved(Path("data"))
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
def test_another_data_set_is_refused_with_its_cause(folder, data, cause):
    assert f"does not match 'tiny': {cause}." in complaint(data, folder)
    load(TINY, folder)  # what is cached now must not hide it
    assert f"does not match 'tiny': {cause}." in complaint(data, folder)


def test_the_embedded_digits_are_whole_and_stratified(monkeypatch):
    monkeypatch.setenv("KDBENCH_DATA", "/nowhere")  # not asked for an embedded data set
    train, test = load(load_suite("digits").data)
    assert train.pixels.shape == (1437, 8, 8, 3) and test.pixels.shape == (360, 8, 8, 3)
    assert train.pixels.dtype == torch.uint8 and train.labels.dtype == torch.int64
    held, whole = test.labels.bincount(), test.labels.bincount() + train.labels.bincount()
    assert len(whole) == 10 and (held - whole * 360 / 1797).abs().max() < 1
    assert train.pixels.min() == 0 and train.pixels.max() == 255


def test_the_second_load_does_not_touch_the_source(folder, monkeypatch):
    load(TINY, folder)
    monkeypatch.setattr(Source, "rows", None)
    assert same(load(TINY, folder), expected())
    subset = load_images(locate(TINY, folder), changed_train(TINY, per_class=2).train)
    assert same((subset,), (expected()[0].first_per_class(2),))


def three_images(_content: bytes) -> bytes:
    stream = io.BytesIO()
    np.savez(stream, pixels=np.zeros((3, 8, 8, 3), np.uint8), labels=np.zeros(3, int))
    return stream.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-100],
        lambda content: b"x" * len(content),
        lambda content: content[:2000] + b"x" * 9 + content[2009:],
        lambda content: re.sub(rb"(?s)(PK\x01\x02.{6}).", b"\\1\xff", content),  # compression
        three_images,
    ],
)
def test_a_damaged_cache_file_is_read_anew(folder, damage):
    before = load(TINY, folder)
    kept = {file: file.read_bytes() for file in cache_folder().iterdir()}
    assert len(kept) == 2
    for file, content in kept.items():
        file.write_bytes(damage(content))
    assert same(load(TINY, folder), before)
    assert {file: file.read_bytes() for file in cache_folder().iterdir()} == kept


def test_a_changed_source_file_is_read_anew(folder):
    rows, plain = pq.read_table(folder / SECOND), {"compression": "none", "use_dictionary": False}
    sizes, pixels = [], []
    for changed_rows in (rows, rows.take(list(reversed(range(20))))):
        pq.write_table(changed_rows, folder / SECOND, **plain)
        sizes.append((folder / SECOND).stat().st_size)
        pixels.append(load(TINY, folder)[0].pixels[20:])
    assert sizes[0] == sizes[1]
    assert torch.equal(pixels[1], pixels[0].flip(0))


def test_a_cache_that_cannot_be_written_stops_nothing_and_has_no_half_file(folder, monkeypatch):
    def full(stream, **_arrays):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr(np, "savez", full)
        assert same(load(TINY, folder), expected())
        assert list(cache_folder().iterdir()) == []
    Path("file").touch()
    monkeypatch.setenv("KDBENCH_CACHE", "file/cache")
    assert same(load(TINY, folder), expected())


def numbered(labels: list[int]) -> Images:
    """Return images whose only pixel is their index."""
    return Images(torch.arange(len(labels))[:, None, None, None], torch.tensor(labels))


def content_of(images: Images) -> tuple[list[int], list[int]]:
    return images.pixels.flatten().tolist(), images.labels.tolist()


def test_the_first_of_each_class_keep_their_order():
    subset = numbered([2, 0, 1, 1, 0, 2, 2, 0, 1]).first_per_class(2)
    assert content_of(subset) == ([0, 1, 2, 3, 4, 5], [2, 0, 1, 1, 0, 2])


def test_the_holdout_is_the_last_share_of_each_class():
    rest, held = numbered([0, 1] * 10 + [1] * 10).hold_out(0.2)
    assert content_of(held) == ([16, 18, 26, 27, 28, 29], [0, 0, 1, 1, 1, 1])
    assert content_of(rest) == ([*range(16), 17, 19, *range(20, 26)], [0, 1] * 8 + [1] * 8)
    assert numbered([0, 1, 1]).hold_out(0.01)[1].labels.tolist() == [0, 1]  # never none


@pytest.mark.slow
@pytest.mark.cifar
@pytest.mark.skipif(not (REAL / "cifar100").is_dir(), reason="no cifar100 in KDBENCH_DATA")
def test_the_real_cifar100_matches_the_suite():
    """Checksums too: `load_images` refuses other pixels, and other sums are refused."""
    data = load_suite("cifar100").data
    assert data.train.sha256 and data.test.sha256
    train, test = load(data, REAL)
    assert train.pixels.shape == (50_000, 32, 32, 3) and test.pixels.shape == (10_000, 32, 32, 3)
    reduced = load_suite("cifar100-reduced").data
    subset = load_images(locate(reduced, REAL), reduced.train)
    for images, per_class in ((train, 500), (test, 100), (subset, 40)):
        assert images.labels.bincount().tolist() == [per_class] * 100
    swapped = changed(data, test=changed(data.test, sha256=data.train.sha256))
    assert "the pixels of 'test' have a different checksum" in complaint(swapped, REAL)
