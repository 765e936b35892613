"""`kdbench data prepare`: its output, resuming after a stop, and errors."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import is_one_sentence
from encoded_data import (
    LAYOUTS,
    SUITE,
    TEST,
    TRAIN,
    content,
    opened,
    photo,
    photo_suite,
    write_parquet,
)
from launched import eventually, left_here
from PIL import Image

from kdbench.data import locate
from kdbench.data.prepare import prepare as module
from kdbench.data.prepare import shards, shrink
from kdbench.data.prepare.manifest import MANIFEST, Manifest, read_manifest
from kdbench.errors import UserError

ORIGINALS, OUT = Path("originals"), Path("out")
FOLDERS = ["--data-dir", "originals", "--output", "out"]
COMMAND = ["data", "prepare", "--suite", "photos.toml", *FOLDERS]
ROWS = content()["train"]
TRAIN_SHARDS = [f"train-0000{shard}-of-00003.parquet" for shard in range(3)]
TEST_SHARDS = [f"validation-0000{shard}-of-00002.parquet" for shard in range(2)]
SIDE = 36
KILLED = """
import os, signal
from kdbench import cli
from kdbench.data.prepare import prepare, shards

prepare.IMAGES_PER_SHARD, shards.ROWS_PER_GROUP = 8, 2
write = prepare.write_manifest

def write_or_die(folder, manifest):
    write(folder, manifest) if len(manifest.shards) < 2 else os.kill(os.getpid(), signal.SIGKILL)

prepare.write_manifest = write_or_die
cli.main()
"""


@pytest.fixture(autouse=True)
def _originals_and_small_shards(monkeypatch):
    monkeypatch.setattr(module, "IMAGES_PER_SHARD", 8)
    monkeypatch.setattr(shards, "ROWS_PER_GROUP", 2)
    Path("photos.toml").write_text(SUITE)
    write_parquet(ORIGINALS)


@pytest.fixture
def command(kdbench):
    """The command, in this process."""
    return lambda *arguments: kdbench(*COMMAND, "--workers", "1", *arguments)


@pytest.fixture
def refusal(command):
    """Return a function that runs the command and returns the sentence that refuses it."""

    def run(*arguments: str) -> str:
        code, out, err = command(*arguments)
        assert (code, out) == (2, "") and is_one_sentence(err)
        return err

    return run


def prepared(originals: Path, output: Path, workers: int = 1, **options) -> Manifest:
    suite = photo_suite()
    source = locate(suite.data, originals)
    manifest = module.load_or_create_manifest(source, module.shorter_side(suite), output)
    return module.prepare(source, manifest, output, workers, **options)


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def pil(encoded: bytes) -> Image.Image:
    return Image.open(io.BytesIO(encoded)).convert("RGB")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prepared_data_are_the_data_set_with_smaller_images(layout):
    originals = LAYOUTS[layout](Path(layout))
    manifest = prepared(originals, OUT)
    assert manifest.is_complete and manifest.images == TRAIN + TEST
    splits = zip(*(opened(photo_suite(), folder) for folder in (originals, OUT)), strict=True)
    for before, after in splits:
        assert torch.equal(before.labels, after.labels)
        small = {row for row in range(len(before)) if min(pil(before.read(row)).size) <= SIDE}
        assert 0 < len(small) < len(before)
        for row in range(len(before)):
            original, image = pil(before.read(row)), pil(after.read(row))
            assert (before.read(row) == after.read(row)) is (row in small)
            assert min(image.size) == min(SIDE, *original.size)
            expected = original.resize(image.size, Image.Resampling.BILINEAR)
            off = np.asarray(image).astype(int) - np.asarray(expected)
            assert np.abs(off).mean() < 6  # of 255 gray levels: small JPEGs of quality 90


def test_shards_are_parquet_as_on_the_hub_for_any_number_of_workers():
    manifest = prepared(ORIGINALS, OUT)
    assert read_manifest(ORIGINALS) is None
    prepared(ORIGINALS, Path("two workers"), workers=2)
    assert files(OUT) == files(Path("two workers"))
    assert files(OUT).keys() == {MANIFEST, *TRAIN_SHARDS, *TEST_SHARDS}
    assert [manifest.shards[name].rows for name in TRAIN_SHARDS] == [6, 7, 7]
    loaded = datasets.load_dataset("parquet", data_dir="out", split="train", cache_dir="cache")
    assert isinstance(loaded.features["image"], datasets.Image)
    assert min(loaded[3]["image"].size) == SIDE
    images = [pq.read_table(OUT / name)["image"].to_pylist() for name in TRAIN_SHARDS]
    names = [image["path"] for shard in images for image in shard]
    assert names == [f"photo{row % 10}.jpg" for row in range(TRAIN)]


def test_images_that_cannot_be_decoded_are_named_and_keep_bytes_index_and_label(command):
    rows, image = content(), photo("train", 13)[:-300]
    rows["train"][13], rows["validation"][2] = (image, 3), (b"", 1)
    write_parquet(ORIGINALS, rows)
    code, out, err = command()
    assert code == 0 and "Prepared 30 images" in out
    assert is_one_sentence(err) and "2 images cannot be decoded" in err
    truncated = "photo3.jpg: its data is truncated"
    expected = [("train", 13, truncated), ("validation", 2, "photo2.jpg: it is empty")]
    for split, index, reason in expected:
        assert f"{split} {index} ({reason})" in err
    assert read_manifest(OUT).undecodable() == expected
    train, test = opened(photo_suite(), OUT)
    assert (train.read(13), train.labels[13], len(train)) == (image, 3, TRAIN)
    assert (test.read(2), test.labels[2], len(test)) == (b"", 1, TEST)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_ctrl_c_and_a_full_disk_keep_finished_shards(command, monkeypatch, error):
    stopped = (130, "Stopped") if isinstance(error, KeyboardInterrupt) else (2, error.strerror)
    prepared(ORIGINALS, Path("at once"))
    with monkeypatch.context() as stopping:
        # The last is of the third shard: a manifest precedes each.
        stopping.setattr(os, "fsync", Mock(side_effect=[None] * 5 + [error]))
        code, out, err = command()
    assert (code, out) == (stopped[0], "") and is_one_sentence(err)
    assert f"{stopped[1]}. 13 of 30 images are prepared; run the same command again" in err
    assert files(OUT).keys() == {MANIFEST, *TRAIN_SHARDS[:2]}
    with pytest.raises(UserError, match="is missing; finish `kdbench data prepare`"):
        locate(photo_suite().data, OUT)
    done, decoded, decode = [], [], shrink.decode
    monkeypatch.setattr(shrink, "decode", lambda data: decoded.append(data) or decode(data))
    prepared(ORIGINALS, OUT, on_images=done.append)
    assert (sum(done), len(decoded)) == (30, 17)
    assert files(OUT) == files(Path("at once")) and command("--check")[0] == 0


@pytest.mark.slow
def test_a_kill_loses_only_the_current_shard_and_leaves_no_process(command):
    killed = [sys.executable, "-c", KILLED, *COMMAND, "--workers", "2"]
    assert subprocess.run(killed).returncode == -signal.SIGKILL
    assert eventually(lambda: not left_here())
    assert len(read_manifest(OUT).shards) == 1
    assert command()[0] == command("--output", "at once")[0] == 0
    assert files(OUT) == files(Path("at once"))


def test_check_finds_damaged_and_missing_shards_and_the_command_repairs_them(command):
    command()
    whole = files(OUT)
    assert read_manifest(OUT).summary == "prepared: shorter side 36, JPEG quality 90"
    assert str(Path.cwd()).encode() not in whole[MANIFEST]
    assert command("--check") == (0, "'out' is complete and intact.\n", "")
    damaged, missing = OUT / TRAIN_SHARDS[1], OUT / TEST_SHARDS[0]
    content = bytearray(damaged.read_bytes())
    content[1000] ^= 1
    damaged.write_bytes(content)
    missing.unlink()
    code, out, err = command("--check")
    assert (code, out, err.count("\n")) == (1, "", 3)
    assert f"{damaged.name} has a different SHA-256." in err
    assert f"{missing.name} is missing." in err and "Delete the corrupt files" in err
    damaged.unlink()
    assert command()[0] == 0
    assert files(OUT) == whole
    manifest = json.loads((OUT / MANIFEST).read_text())
    del manifest["shards"][TRAIN_SHARDS[2]]
    (OUT / MANIFEST).write_text(json.dumps(manifest))
    assert "7 of 30 images are not prepared yet." in command("--check")[2]
    (OUT / MANIFEST).write_text("{}")
    with pytest.raises(UserError, match="is damaged"):
        read_manifest(OUT)


def test_dry_run_prints_images_size_and_time_and_writes_nothing(command):
    code, out, err = command("--dry-run")
    assert (code, err) == (0, "") and not OUT.exists()
    assert "photos (parquet) to shorter side 36, JPEG quality 90" in out
    assert "30 of 30 images" in out and "kB in 'out'" in out
    assert "about 1 min with --workers 1" in out
    command()
    assert "0 of 30 images to prepare" in command("--dry-run")[1]


def test_a_disk_that_is_too_small_is_refused_before_work_begins(refusal, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", Mock(return_value=Mock(free=1000)))
    assert "has 1.0 kB free; free some space" in refusal()
    assert not OUT.exists()


def test_other_settings_originals_and_folders_are_refused_and_not_touched(command, refusal):
    def now() -> list[dict[str, bytes]]:
        return [files(Path(folder)) for folder in ("originals", "out", "theirs")]

    write_parquet(Path("theirs"))
    command()
    before = now()
    assert "inside the folder" in refusal("--output", "originals")
    assert "did not write" in refusal("--output", "theirs")
    for output in ("out", "again"):
        assert "already prepared" in refusal("--data-dir", "out", "--output", output)
    Path("photos.toml").write_text(SUITE.replace("resize = 36", "resize = 40"))
    err = refusal()
    assert "shorter side 36" in err and "now shorter side 40" in err and "--output" in err
    assert now() == before
    Path("photos.toml").write_text(SUITE)
    write_parquet(ORIGINALS, content() | {"train": ROWS[:19] + ROWS[:1]})
    assert "from other originals" in refusal()
    assert files(OUT) == before[1]


@pytest.mark.parametrize(
    ("arguments", "change", "words"),
    [
        (["--workers", "0"], {}, "--workers must be at least 1"),
        (["--suite", "cifar100"], {}, "'cifar100' trains on small images"),
        (["--data-dir", "nowhere"], {}, "'nowhere' does not exist"),
        (["--output", "photos.toml"], {}, "'photos.toml' is not a folder"),
        (["--check"], {}, "'out' has no prepared images"),
        (["--output", "originals/smaller"], {}, "inside the folder of the originals"),
        ([], {"train": ROWS[1:]}, "'train' has 19 images instead of 20"),
        ([], {"validation": ROWS[:11]}, "has 11 images instead of 10"),
        ([], {"train": [*ROWS[:12], (b"", 4), *ROWS[13:]]}, "image 12 of 'train' has label 4"),
    ],
)
def test_bad_input_and_another_data_set_are_refused(refusal, arguments, change, words):
    write_parquet(ORIGINALS, content() | change)
    assert words in refusal(*arguments)
    assert not OUT.exists()


def test_parquet_that_is_damaged_is_named(refusal):
    file = ORIGINALS / "train-00001-of-00002.parquet"
    os.truncate(file, file.stat().st_size - 100)
    assert f"'{file}' cannot be read" in refusal()
