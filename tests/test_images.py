"""Images in memory: the embedded digits, the cache, subsets and the real CIFAR-100."""

import io
import os
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from tiny_data import (
    DIGITS,
    SECOND,
    TINY,
    changed_train,
    complaint,
    expected,
    load,
    same,
    table,
    write_parquet,
)

from kdbench.data import Images, Source, load_images, locate
from kdbench.data.decoded.images import cache_folder
from kdbench.suite.load import load_suite

REAL = Path(os.environ.get("KDBENCH_DATA") or "none").absolute()  # tests change the working folder


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KDBENCH_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_parquet(tmp_path / "data")


def test_the_embedded_digits_are_whole_and_stratified(monkeypatch):
    monkeypatch.setenv("KDBENCH_DATA", "/nowhere")  # not asked for an embedded data set
    train, test = load(DIGITS)
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


def unknown_compression(content: bytes) -> bytes:
    """Set a compression method that zipfile does not know in the archive's directory."""
    place = content.rindex(b"PK\x01\x02") + 10
    return content[:place] + b"\xff" + content[place + 1 :]


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
        unknown_compression,
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
    rows, plain = table("train").slice(25), {"compression": "none", "use_dictionary": False}
    pq.write_table(rows, folder / SECOND, **plain)
    size = (folder / SECOND).stat().st_size
    before, _ = load(TINY, folder)
    pq.write_table(rows.take(list(range(14, -1, -1))), folder / SECOND, **plain)
    assert (folder / SECOND).stat().st_size == size
    after, _ = load(TINY, folder)
    assert torch.equal(after.pixels[25:], before.pixels[25:].flip(0))


def test_an_unwritable_cache_folder_does_not_stop_loading(folder, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KDBENCH_CACHE", str(tmp_path / "file" / "cache"))
    assert same(load(TINY, folder), expected())


def test_a_full_disk_does_not_stop_and_leaves_no_half_file(folder, monkeypatch):
    def full(stream, **_arrays):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    assert same(load(TINY, folder), expected())
    assert list(cache_folder().iterdir()) == []


def numbered(labels: list[int]) -> Images:
    """Return images whose only pixel is their index."""
    return Images(torch.arange(len(labels))[:, None, None, None], torch.tensor(labels))


def test_the_first_of_each_class_keep_their_order():
    subset = numbered([2, 0, 1, 1, 0, 2, 2, 0, 1]).first_per_class(2)
    assert subset.pixels.flatten().tolist() == [0, 1, 2, 3, 4, 5]
    assert subset.labels.tolist() == [2, 0, 1, 1, 0, 2]


def test_the_holdout_is_the_last_share_of_each_class():
    rest, held = numbered([0, 1] * 10 + [1] * 10).hold_out(0.2)
    assert held.pixels.flatten().tolist() == [16, 18, 26, 27, 28, 29]
    assert held.labels.tolist() == [0, 0, 1, 1, 1, 1]
    assert rest.pixels.flatten().tolist() == [*range(16), 17, 19, *range(20, 26)]
    assert rest.labels.tolist() == [0, 1] * 8 + [1] * 8
    assert numbered([0, 1, 1]).hold_out(0.01)[1].labels.tolist() == [0, 1]  # never none


@pytest.mark.slow
@pytest.mark.cifar
@pytest.mark.skipif(
    not (REAL / "cifar100").is_dir(), reason="KDBENCH_DATA names no folder with cifar100 in it"
)
def test_the_real_cifar100_matches_the_suite():
    """Checksums too: `load_images` refuses other pixels, and other sums are refused."""
    data = load_suite("cifar100").data
    assert data.train.sha256 and data.test.sha256
    train, test = load(data, REAL)
    assert train.pixels.shape == (50_000, 32, 32, 3) and test.pixels.shape == (10_000, 32, 32, 3)
    assert train.labels.bincount().tolist() == [500] * 100
    assert test.labels.bincount().tolist() == [100] * 100
    reduced = load_suite("cifar100-reduced").data
    subset = load_images(locate(reduced, REAL), reduced.train)
    assert subset.labels.bincount().tolist() == [40] * 100
    swapped = data.model_copy(
        update={"test": data.test.model_copy(update={"sha256": data.train.sha256})}
    )
    assert "the pixels of 'test' have a different checksum" in complaint(swapped, REAL)
