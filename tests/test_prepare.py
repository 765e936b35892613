"""`kdbench data prepare`: its output, resuming after a stop, and errors."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import datasets
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from conftest import is_one_sentence
from encoded_data import LAYOUTS, SUITE, TEST, TRAIN, content, opened, photo_suite, write_parquet
from launched import eventually, group_exists
from PIL import Image

from kdbench.data import locate
from kdbench.data.prepare import prepare as module
from kdbench.data.prepare import shards, shrink
from kdbench.data.prepare.manifest import MANIFEST, Manifest, read_manifest
from kdbench.errors import PlanInterruptedError, UserError

SIDE = 36
NEAR = 6.0
"""Maximum mean error in gray levels (of 255) of small JPEG images of quality 90."""
KILLED = """
import sys, time
from kdbench import cli
from kdbench.data.prepare import prepare, shards

prepare.IMAGES_PER_SHARD, shards.ROWS_PER_GROUP = 8, 2
write = prepare.write_manifest

def stop_at_the_second_shard(folder, manifest):
    if len(manifest.shards) == 2:
        print("now", flush=True)
        time.sleep(60)
    write(folder, manifest)

prepare.write_manifest = stop_at_the_second_shard
sys.argv = ["kdbench", *sys.argv[1:]]
cli.main()
"""


@pytest.fixture(autouse=True)
def _small_shards(monkeypatch):
    monkeypatch.setattr(module, "IMAGES_PER_SHARD", 8)
    monkeypatch.setattr(shards, "ROWS_PER_GROUP", 2)


@pytest.fixture
def command(kdbench):
    """The command, from Parquet files in `originals` to the folder `out`, in this process."""
    Path("photos.toml").write_text(SUITE)
    write_parquet(Path("originals"))

    def run(*arguments: str, workers: int = 1) -> tuple[int, str, str]:
        fixed = ["--suite", "photos.toml", "--data-dir", "originals", "--output", "out"]
        return kdbench("data", "prepare", *fixed, "--workers", str(workers), *arguments)

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
def test_prepared_data_are_the_data_set_with_smaller_images(tmp_path, layout):
    originals, output = LAYOUTS[layout](tmp_path / "originals"), tmp_path / "out"
    manifest = prepared(originals, output)
    assert manifest.is_complete and manifest.images == TRAIN + TEST
    splits = zip(*(opened(photo_suite(), folder) for folder in (originals, output)), strict=True)
    for before, after in splits:
        assert torch.equal(before.labels, after.labels)
        for row in range(len(before)):
            original, image = pil(before.read(row)), pil(after.read(row))
            assert min(image.size) == min(SIDE, *original.size)
            expected = original.resize(image.size, Image.Resampling.BILINEAR)
            off = np.asarray(image).astype(int) - np.asarray(expected)
            assert np.abs(off).mean() < NEAR


def test_shards_are_parquet_as_on_the_hub(tmp_path):
    output = tmp_path / "out"
    manifest = prepared(write_parquet(tmp_path / "originals"), output)
    train = [f"train-0000{shard}-of-00003.parquet" for shard in range(3)]
    test = [f"validation-0000{shard}-of-00002.parquet" for shard in range(2)]
    assert sorted(files(output)) == sorted([MANIFEST, *train, *test])
    assert [manifest.shards[name].rows for name in train] == [6, 7, 7]
    loaded = datasets.load_dataset(
        "parquet", data_dir=str(output), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert isinstance(loaded.features["image"], datasets.Image)
    assert min(loaded[3]["image"].size) == SIDE
    paths = [pq.read_table(output / name)["image"].combine_chunks().field("path") for name in train]
    names = [path for part in paths for path in part.to_pylist()]
    assert names == [f"photo{row % 10}.jpg" for row in range(TRAIN)]


def test_images_that_are_not_larger_keep_their_bytes(tmp_path):
    originals = write_parquet(tmp_path / "originals")
    prepared(originals, tmp_path / "out")
    before, after = (opened(photo_suite(), folder)[0] for folder in (originals, tmp_path / "out"))
    small = [min(pil(before.read(row)).size) <= SIDE for row in range(TRAIN)]
    assert any(small) and not all(small)
    assert [before.read(row) == after.read(row) for row in range(TRAIN)] == small


def test_images_that_cannot_be_decoded_are_named_and_keep_bytes_index_and_label(command):
    rows = content()
    whole, label = rows["train"][13]
    rows["train"][13] = (whole[: len(whole) // 2], label)
    rows["validation"][2] = (b"", rows["validation"][2][1])
    write_parquet(Path("originals"), rows)
    code, out, err = command()
    assert code == 0 and "Prepared 30 images" in out
    assert is_one_sentence(err) and "2 images cannot be decoded" in err
    ends = "its data is truncated"
    expected = [("train", 13, f"photo3.jpg: {ends}"), ("validation", 2, "photo2.jpg: it is empty")]
    for split, index, reason in expected:
        assert f"{split} {index} ({reason})" in err
    assert read_manifest(Path("out")).undecodable() == expected
    train, test = opened(photo_suite(), Path("out"))
    assert train.read(13) == whole[: len(whole) // 2] and int(train.labels[13]) == label
    assert (test.read(2), len(train), len(test)) == (b"", TRAIN, TEST)


def test_the_number_of_workers_changes_no_byte(tmp_path):
    originals = write_parquet(tmp_path / "originals")
    for workers in (1, 2):
        prepared(originals, tmp_path / str(workers), workers)
    assert files(tmp_path / "1") == files(tmp_path / "2")


def test_ctrl_c_keeps_finished_shards_and_the_same_command_resumes(tmp_path, monkeypatch):
    originals, output = write_parquet(tmp_path / "originals"), tmp_path / "out"
    prepared(originals, tmp_path / "at once")

    seen = []

    def stop(count: int) -> None:
        seen.append(count)
        if sum(seen) > 13:
            raise KeyboardInterrupt

    with pytest.raises(PlanInterruptedError, match="13 of 30 images are prepared; run the same"):
        prepared(originals, output, on_images=stop)
    assert len(files(output)) == 3
    with pytest.raises(UserError, match="is missing; finish `kdbench data prepare`"):
        locate(photo_suite().data, output)
    done, decoded = [], []
    decode = shrink.decode
    monkeypatch.setattr(shrink, "decode", lambda data: decoded.append(data) or decode(data))
    prepared(originals, output, on_images=done.append)
    assert files(output) == files(tmp_path / "at once")
    assert (sum(done), len(decoded)) == (30, 17)


@pytest.mark.slow
def test_a_kill_loses_only_the_current_shard_and_leaves_no_process(command):
    known = ["--suite", "photos.toml", "--data-dir", "originals", "--output", "out"]
    arguments = ["data", "prepare", *known, "--workers", "2"]
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, *arguments],
        stdout=subprocess.PIPE,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"now\n"
        process.kill()
    _wait_for_the_end_of(process.pid)
    assert len(read_manifest(Path("out")).shards) == 1
    assert command()[0] == 0
    shutil.move("out", "killed")
    command()
    assert files(Path("killed")) == files(Path("out"))


def _wait_for_the_end_of(group: int) -> None:
    if not eventually(lambda: not group_exists(group)):
        os.killpg(group, signal.SIGKILL)
        pytest.fail("processes outlive the one that started them")


def test_ctrl_c_prints_one_sentence(command, monkeypatch):
    def interrupted(*_arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(module.ShardWriter, "write", interrupted)
    code, out, err = command()
    assert (code, out) == (130, "") and is_one_sentence(err)
    assert "0 of 30 images are prepared; run the same command again" in err


def test_check_finds_damaged_and_missing_shards_and_the_command_repairs_them(command):
    command()
    whole = files(Path("out"))
    assert command("--check") == (0, "'out' is complete and intact.\n", "")
    damaged, missing = (
        Path("out/train-00001-of-00003.parquet"),
        Path("out/validation-00000-of-00002.parquet"),
    )
    content = bytearray(damaged.read_bytes())
    content[1000] ^= 1
    damaged.write_bytes(content)
    missing.unlink()
    code, out, err = command("--check")
    assert (code, out) == (1, "")
    assert (
        f"{damaged.name} has a different SHA-256." in err and f"{missing.name} is missing." in err
    )
    assert err.count("\n") == 3 and "Delete the corrupt files" in err
    damaged.unlink()
    assert command()[0] == 0
    assert files(Path("out")) == whole
    manifest = json.loads((Path("out") / MANIFEST).read_text())
    del manifest["shards"]["train-00002-of-00003.parquet"]
    (Path("out") / MANIFEST).write_text(json.dumps(manifest))
    assert "7 of 30 images are not prepared yet." in command("--check")[2]


def test_dry_run_prints_images_size_and_time_and_writes_nothing(command):
    code, out, err = command("--dry-run")
    assert (code, err) == (0, "") and not Path("out").exists()
    for words in ("photos (parquet) to shorter side 36, JPEG quality 90", "30 of 30 images"):
        assert words in out
    assert "kB in 'out'" in out and "about 1 min with --workers 1" in out
    command()
    assert "0 of 30 images to prepare" in command("--dry-run")[1]


def test_a_disk_that_is_too_small_is_refused_before_work_begins(command, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000, 0, 1000))
    code, _, err = command()
    assert code == 2 and is_one_sentence(err) and "has 1.0 kB free; free some space" in err
    assert not Path("out").exists()


def test_a_full_disk_prints_one_sentence_and_the_command_resumes(command, monkeypatch):
    fsync, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 4:  # manifest, shard, manifest, shard
            raise OSError(28, "No space left on device")
        fsync(descriptor)

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        code, _, err = command()
    assert code == 2 and is_one_sentence(err)
    assert "No space left on device. 6 of 30 images are prepared; run the same command again" in err
    assert sorted(files(Path("out"))) == [MANIFEST, "train-00000-of-00003.parquet"]
    assert command()[0] == 0 and command("--check")[0] == 0


def test_other_settings_or_originals_are_refused(command):
    command()
    before = files(Path("out"))
    Path("photos.toml").write_text(SUITE.replace("resize = 36", "resize = 40"))
    code, _, err = command()
    assert code == 2 and is_one_sentence(err)
    assert "shorter side 36" in err and "now shorter side 40" in err and "--output" in err
    Path("photos.toml").write_text(SUITE)
    rows = content()
    rows["train"][0] = (rows["train"][0][0] + bytes(100), 0)
    write_parquet(Path("originals"), rows)
    code, _, err = command()
    assert code == 2 and is_one_sentence(err) and "from other originals" in err
    assert files(Path("out")) == before


def test_foreign_folders_and_prepared_originals_are_not_touched(command):
    write_parquet(Path("theirs"))
    for output, words in (("originals", "inside the folder"), ("theirs", "did not write")):
        before = files(Path(output))
        code, _, err = command("--output", output)
        assert code == 2 and is_one_sentence(err) and words in err
        assert files(Path(output)) == before
    command()
    for output in ("out", "again"):
        code, _, err = command("--data-dir", "out", "--output", output)
        assert code == 2 and is_one_sentence(err) and "already prepared" in err


def change(rows, split, index, image=None, label=None):
    old = rows[split][index]
    rows[split][index] = (old[0] if image is None else image, old[1] if label is None else label)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda rows: rows["train"].pop(), "'train' has 19 images instead of 20"),
        (lambda rows: rows["validation"].append(rows["train"][0]), "has 11 images instead of 10"),
        (lambda rows: change(rows, "train", 12, label=4), "image 12 of 'train' has label 4"),
    ],
)
def test_another_data_set_is_refused(command, damage, words):
    rows = content()
    damage(rows)
    write_parquet(Path("originals"), rows)
    code, _, err = command()
    assert code == 2 and is_one_sentence(err) and words in err
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--workers", "0"], "--workers must be at least 1"),
        (["--suite", "cifar100"], "'cifar100' trains on small images"),
        (["--data-dir", "nowhere"], "'nowhere' does not exist"),
        (["--output", "photos.toml"], "'photos.toml' is not a folder"),
        (["--check"], "'out' has no prepared images"),
        (["--output", "originals/smaller"], "inside the folder of the originals"),
    ],
)
def test_bad_input_prints_one_sentence(command, arguments, words):
    code, out, err = command(*arguments)
    assert (code, out) == (2, "") and is_one_sentence(err) and words in err


def test_the_manifest_says_how_images_were_made(command):
    assert read_manifest(Path("originals")) is None
    command()
    manifest = read_manifest(Path("out"))
    assert manifest is not None
    assert manifest.summary == "prepared: shorter side 36, JPEG quality 90"
    assert str(Path.cwd()) not in (Path("out") / MANIFEST).read_text()
    (Path("out") / MANIFEST).write_text("{}")
    with pytest.raises(UserError, match="is damaged"):
        read_manifest(Path("out"))


def test_parquet_that_is_damaged_is_named(command):
    file = Path("originals/train-00001-of-00002.parquet")
    file.write_bytes(file.read_bytes()[:-100])
    code, _, err = command()
    assert code == 2 and is_one_sentence(err) and f"'{file}' cannot be read" in err
