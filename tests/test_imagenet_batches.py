"""Batches of encoded images: crops, order, processes, workers and unreadable files."""

import gc
import io
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import product
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest
import torch
from conftest import Watcher
from encoded_data import TEST, TRAIN, content, opened, photo_suite, write_folders, write_saved
from launched import eventually, group_exists
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from kdbench.data import IGNORE_INDEX, evaluation_batches, training_batches
from kdbench.data.encoded import workers
from kdbench.data.encoded.crops import DRAWS, random_resized_box
from kdbench.data.encoded.images import EncodedImages
from kdbench.data.encoded.workers import LoaderError
from kdbench.errors import UserError
from kdbench.launch.execution import run_one
from kdbench.launch.plan import make_specs
from kdbench.signals import SIGNALS
from kdbench.suite.sections import RandomResizedCrop
from kdbench.suite.suite import Suite

CROP = RandomResizedCrop(scale=(0.08, 1.0), ratio=(3 / 4, 4 / 3))
Epoch = list[tuple[Tensor, Tensor]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_saved(tmp_path_factory.mktemp("photos") / "saved")


@pytest.fixture
def suite() -> Suite:
    return photo_suite()


@pytest.fixture
def images(suite, folder) -> tuple[EncodedImages, EncodedImages]:
    """Training and test images, decoded in this process."""
    return opened(suite, folder)


def epoch(images: EncodedImages, suite: Suite, number=0, seed=0, views=1, **place) -> Epoch:
    return list(training_batches(images, suite, seed, views, **place).epoch(number))


def same(left: Epoch, right: Epoch) -> bool:
    pairs = zip(left, right, strict=True)
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in pairs)


def normalised(suite: Suite, pixels: np.ndarray) -> Tensor:
    """Normalize an (H, W, 3) image with plain arithmetic."""
    image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1).float() / 255
    mean, std = torch.tensor([suite.augmentation.mean, suite.augmentation.std])[:, :, None, None]
    return (image - mean) / std


def torchvisions_box(transform: v2.RandomResizedCrop, height: int, width: int) -> tuple[int, ...]:
    params = transform.make_params([torch.empty(3, height, width)])
    return tuple(params[key] for key in ("top", "left", "height", "width"))


def test_a_box_follows_from_its_draws():
    sure, last = [0.5, 0.5] * 10, 1 - 2**-24  # 0.54 of the area, as wide as high
    side = round((200 * 300 * 0.54) ** 0.5)
    for draw, top, left in ((0, 0, 0), (last, 200 - side, 300 - side)):
        box = random_resized_box(200, 300, [*sure, draw, draw, 0], CROP)
        assert box == (top, left, side, side)
    # The first attempt is wider than the image, the second decides.
    small = [0.0, 0.5] * 9
    side = round((200 * 300 * 0.08) ** 0.5)
    assert random_resized_box(200, 300, [last, last, *small, 0, 0, 0], CROP)[2:] == (side, side)


@pytest.mark.parametrize(("height", "width"), [(500, 20), (20, 500), (3, 1000), (1, 1)])
def test_an_image_that_fits_no_box_is_cropped_at_its_centre_as_in_torchvision(height, width):
    torch.manual_seed(0)
    whole = RandomResizedCrop(scale=(1.0, 1.0), ratio=CROP.ratio)
    box = random_resized_box(height, width, [0.5] * DRAWS, whole)
    assert box == torchvisions_box(v2.RandomResizedCrop(8, scale=whole.scale), height, width)


def test_boxes_are_spread_as_torchvisions_are():
    torch.manual_seed(0)
    draws = torch.rand(4000, DRAWS).tolist()
    ours = torch.tensor([random_resized_box(375, 500, draw, CROP) for draw in draws]).double()
    transform = v2.RandomResizedCrop(224)
    theirs = torch.tensor([torchvisions_box(transform, 375, 500) for _ in draws]).double()
    assert ((ours[:, 0] + ours[:, 2]) <= 375).all() and ((ours[:, 1] + ours[:, 3]) <= 500).all()
    # Means and deviations within four standard errors.
    tolerance = 4 * theirs.std(0) * (2 / 4000) ** 0.5
    assert ((ours.mean(0) - theirs.mean(0)).abs() < tolerance).all()
    assert ((ours.std(0) - theirs.std(0)).abs() < tolerance).all()


def test_a_view_is_a_crop_of_its_image_resized_flipped_and_normalised(suite, images):
    batches = training_batches(images[0], suite, 0, 2)
    flips = 0
    for (views, labels), task in zip(batches.epoch(0), batches._tasks(0), strict=True):
        assert views.shape == (2, 8, 3, 32, 32) and views.dtype == torch.float32
        assert views[0].is_contiguous(memory_format=torch.channels_last)
        assert labels.tolist() == images[0].labels[task.positions].tolist()
        for view, column in product(range(2), range(8)):
            draws = task.draws[view, column].tolist()
            picture = Image.open(io.BytesIO(images[0].read(task.positions[column])))
            top, left, height, width = random_resized_box(*picture.size[::-1], draws, CROP)
            crop = picture.crop((left, top, left + width, top + height))
            pixels = np.asarray(crop.resize((32, 32), Image.Resampling.BILINEAR))
            flipped = draws[-1] < 0.5
            flips += flipped
            expected = normalised(suite, pixels[:, ::-1] if flipped else pixels)
            assert (views[view, column] - expected).abs().max() < 0.03  # two grey levels
    assert 8 < flips < 24


def test_an_epoch_is_whole_batches_of_distinct_images_with_independent_draws(suite, images):
    batches = training_batches(images[0], suite, 0, 3)
    tasks = list(batches._tasks(0))
    assert len(batches) == len(tasks) == TRAIN // 8
    positions = np.concatenate([task.positions for task in tasks])
    assert len(np.unique(positions)) == len(positions) == 16
    draws = torch.tensor(np.stack([task.draws for task in tasks])).flatten(0, 2)
    assert len(draws[:, 0].unique()) == len(draws) == 2 * 3 * 8
    assert 0.2 < (draws[:, -1] < 0.5).float().mean() < 0.8
    augmentation = suite.augmentation.model_copy(update={"horizontal_flip": False})
    upright = suite.model_copy(update={"augmentation": augmentation})
    for task in training_batches(images[0], upright, 0, 3)._tasks(0):
        assert (task.draws[:, :, -1] >= 0.5).all()


def test_order_and_draws_depend_on_seed_and_epoch_alone(suite, images):
    reference = epoch(images[0], suite, number=1)
    batches = training_batches(images[0], suite, 0, 1)
    list(batches.epoch(0))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert same(list(batches.epoch(1)), reference)
    assert torch.equal(torch.get_rng_state(), before)  # the run's own draws are left alone
    for views, labels in zip(epoch(images[0], suite, number=1, views=3), reference, strict=True):
        assert torch.equal(views[0][0], labels[0][0]) and torch.equal(views[1], labels[1])
    for other in ({"number": 0}, {"number": 1, "seed": 1}):
        assert not same(epoch(images[0], suite, **other), reference)


@pytest.mark.parametrize(("processes", "task_size"), [(1, 3), (2, 3), (2, 32), (4, 32)])
def test_the_slices_of_all_processes_make_the_global_batch(
    suite, images, monkeypatch, processes, task_size
):
    batches = epoch(images[0], suite, views=2)
    monkeypatch.setattr("kdbench.data.encoded.batches.TASK_SIZE", task_size)
    ranks = range(processes)
    parts = [epoch(images[0], suite, views=2, rank=r, processes=processes) for r in ranks]
    for whole, *slices in zip(batches, *parts, strict=True):
        assert torch.equal(torch.cat([views for views, _ in slices], dim=1), whole[0])
        assert torch.equal(torch.cat([labels for _, labels in slices]), whole[1])
    with pytest.raises(UserError, match=r"batch size 8 .* does not divide by 3 processes"):
        training_batches(images[0], suite, 0, 1, rank=0, processes=3)


@pytest.mark.parametrize("processes", [1, 2, 3])
def test_evaluation_shows_the_centre_of_each_image_once(suite, images, processes):
    seen = []
    for rank in range(processes):
        positions = range(rank, TEST, processes)
        shown = list(evaluation_batches(images[1], suite, rank, processes))
        assert all(len(labels) <= suite.evaluation_batch_size for _, labels in shown)
        pixels = torch.cat([pixels for pixels, _ in shown])
        for image, position in zip(pixels, positions, strict=True):
            picture = Image.open(io.BytesIO(images[1].read(position)))
            by_hand = v2.Compose([v2.Resize(36), v2.CenterCrop(32)])(picture)
            assert (image - normalised(suite, np.asarray(by_hand))).abs().max() < 0.03
        seen += [*zip(positions, torch.cat([labels for _, labels in shown]).tolist(), strict=True)]
    assert sorted(seen) == list(enumerate(images[1].labels.tolist()))


def test_the_number_of_workers_changes_no_pixels_and_workers_persist(suite, folder):
    train, test = opened(suite, folder)
    with_workers = [replace(images, workers=2) for images in (train, test)]
    batches = training_batches(with_workers[0], suite, 0, 2)
    pids = set()
    for number in range(3):
        assert same(list(batches.epoch(number)), epoch(train, suite, number, views=2))
        pids.add(tuple(w.pid for w in batches._pool._loader._iterator._workers))
    assert len(pids) == 1 and len(next(iter(pids))) == 2
    evaluation = evaluation_batches(with_workers[1], suite)
    assert same(list(evaluation), list(evaluation_batches(test, suite)))
    # One pass at a time; one that was given up leaves nothing of itself in the next.
    given_up = batches.epoch(0)
    next(given_up)
    with pytest.raises(RuntimeError, match="has not finished"):
        next(batches.epoch(1))
    given_up.close()
    assert same(list(batches.epoch(1)), epoch(train, suite, 1, views=2))


def test_undecodable_images_are_replaced_in_training_and_ignored_in_evaluation(suite, images):
    # Two neighbours in class 0, one in the middle of class 1, and one at the end of class 3.
    rows, stand_in = content(train=[0, 4, 9, 19], validation=[6]), {0: 8, 4: 8, 9: 13, 19: 3}
    damaged = opened(suite, write_saved(Path("damaged"), rows))
    batches, reader = training_batches(damaged[0], suite, 0, 1), images[0].reader
    replaced = SimpleNamespace(read=lambda row: reader.read(stand_in.get(row, row)))
    assert same(list(batches.epoch(0)), epoch(replace(images[0], reader=replaced), suite))
    list(batches.epoch(1))
    names = {f"train: row {row} (photo{row}.jpg)" for row in stand_in}
    assert batches.undecodable == dict.fromkeys(names, "it is not in a known image format")
    evaluation = evaluation_batches(damaged[1], suite)
    pixels, labels = (torch.cat(part) for part in zip(*evaluation, strict=True))
    whole = images[1].labels.tolist()
    assert labels.tolist() == [*whole[:6], IGNORE_INDEX, *whole[7:]]
    assert (pixels[6] - normalised(suite, np.full((32, 32, 3), 128, np.uint8))).abs().max() < 1e-5
    assert list(evaluation.undecodable) == ["validation: row 6 (photo6.jpg)"]
    substituted = evaluation_batches(damaged[1], suite, substitute=True)
    assert torch.cat([labels for _, labels in substituted]).tolist() == whole


def test_a_class_without_any_image_ends_the_run(suite):
    train, _ = opened(suite, write_saved(Path("none"), content(train=list(range(1, TRAIN, 4)))))
    with pytest.raises(LoaderError, match="no image of class 1 can be decoded"):
        epoch(train, suite)


def test_the_holdout_is_the_last_of_each_class_without_replacements(suite, images):
    rest, held = images[0].hold_out(0.2)
    assert sorted(held.labels.tolist()) == [0, 1, 2, 3]
    assert (rest.rows.tolist(), held.rows.tolist()) == (list(range(16)), [16, 17, 18, 19])


def test_a_worker_that_hangs_is_killed_after_the_timeout(suite, monkeypatch):
    monkeypatch.setattr(workers, "POLL_SECONDS", 1)
    monkeypatch.setattr(workers, "TIMEOUT_SECONDS", 2)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)  # to end one
    folder = write_folders(Path("root"))
    train, _ = opened(suite, folder, workers=1)
    for file in list(folder.glob("train/n00000003/*")):
        file.unlink()
        os.mkfifo(file)  # a worker waits forever for what nobody writes
    started = time.monotonic()
    with pytest.raises(LoaderError, match="no image was decoded for 2 seconds"):
        epoch(train, suite)
    assert time.monotonic() - started < 40


def test_after_a_worker_died_others_start(images, monkeypatch):
    monkeypatch.setattr(workers, "POLL_SECONDS", 1)
    small = photo_suite(batch_size=2)  # more batches than are decoded ahead
    batches = training_batches(replace(images[0], workers=1), small, 0, 1)
    stream = batches.epoch(0)
    next(stream)
    batches._pool._loader._iterator._workers[0].kill()
    with pytest.raises(LoaderError, match="died"):
        list(stream)
    assert same(list(batches.epoch(1)), epoch(images[0], small, 1))


def test_a_signal_to_the_process_group_spares_decoding_workers(suite, images):
    expected = epoch(images[0], suite)
    stream = training_batches(replace(images[0], workers=1), suite, 0, 1).epoch(0)
    seen = [next(stream)]
    server = forkserver._forkserver._forkserver_pid  # workers end with it
    for number in SIGNALS:
        os.kill(server, number)
    time.sleep(0.5)
    assert same([*seen, *stream], expected)
    assert psutil.Process(server).status() != psutil.STATUS_ZOMBIE


@pytest.mark.parametrize("number", [0, 1])
def test_an_unreadable_image_is_named(suite, accelerator, tmp_path, number):
    folder = write_folders(Path("root"))
    images = opened(suite, folder, workers=number)
    victim = "n00000001/n00000001_001.JPEG"
    Path(folder, "train", victim).unlink()
    (spec,) = make_specs(suite, ["baseline"], [])
    result = run_one(spec, *images, tmp_path, accelerator, Watcher())
    assert result.reason == f"train: {victim} cannot be read: No such file or directory"
    assert result.status == "failed"


LEAVES = """
import builtins, os, sys
from pathlib import Path
from encoded_data import opened, photo_suite, write_saved
from kdbench.data import training_batches

suite = photo_suite()
images, _ = opened(suite, write_saved(Path("saved")), workers=2)
batches = training_batches(images, suite, seed=0, views=1)
builtins.kept = batches.epoch(0), batches
next(builtins.kept[0])
os.kill(os.getpid(), int(sys.argv[1]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, signal.SIGKILL], ids=["ended", "killed"])
def test_a_process_that_ends_within_a_pass_leaves_no_worker(number):
    """Workers ignore SIGTERM, so a handler that sends it and waits would never return."""
    process = subprocess.Popen(
        [sys.executable, "-c", LEAVES, str(int(number))],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        process_group=0,
    )
    try:
        assert process.wait(timeout=100) == -number
        assert eventually(lambda: not group_exists(process.pid), seconds=30)
    finally:
        if group_exists(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def test_workers_end_with_their_batches_and_after_a_failed_pass(suite, images):
    """Workers also end if their batches are part of a reference cycle, as in a run."""
    before = set(multiprocessing.active_children())
    circle = [training_batches(replace(images[0], workers=2), suite, 0, 1)]
    list(circle[0].epoch(0))
    assert len(set(multiprocessing.active_children()) - before) == 2
    circle.append(circle)
    del circle
    gc.collect()
    assert not set(multiprocessing.active_children()) - before
    batches = training_batches(replace(images[0], workers=1), suite, 0, 1)
    broken = batches.epoch(0)
    next(broken)
    broken.close()
    assert not set(multiprocessing.active_children()) - before
