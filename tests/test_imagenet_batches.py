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

import numpy as np
import psutil
import pytest
import torch
from conftest import Watcher
from encoded_data import (
    CLASSES,
    TEST,
    TRAIN,
    content,
    opened,
    photo_suite,
    write_folders,
    write_saved,
)
from launched import eventually, group_exists
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from kdbench.data import IGNORE_INDEX, evaluation_batches, training_batches
from kdbench.data.encoded import workers
from kdbench.data.encoded.crops import DRAWS, random_resized_box
from kdbench.data.encoded.images import EncodedImages
from kdbench.data.encoded.workers import LoaderError
from kdbench.discovery import find_methods
from kdbench.engine.spec import RunSpec
from kdbench.errors import UserError
from kdbench.launch.execution import run_one
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


def test_a_box_follows_from_its_draws():
    sure = [0.5, 0.5] * 10  # 0.54 of the area, as wide as high
    side = round((200 * 300 * 0.54) ** 0.5)
    assert random_resized_box(200, 300, [*sure, 0, 0, 0], CROP) == (0, 0, side, side)
    last = 1 - 2**-24
    box = random_resized_box(200, 300, [*sure, last, last, 0], CROP)
    assert box == (200 - side, 300 - side, side, side)
    # The first attempt is wider than the image, the second decides.
    small = [0.0, 0.5] * 9
    side = round((200 * 300 * 0.08) ** 0.5)
    assert random_resized_box(200, 300, [last, last, *small, 0, 0, 0], CROP)[2:] == (side, side)


@pytest.mark.parametrize(("height", "width"), [(500, 20), (20, 500), (3, 1000), (1, 1)])
def test_an_image_that_fits_no_box_is_cropped_at_its_centre_as_in_torchvision(height, width):
    torch.manual_seed(0)
    whole = RandomResizedCrop(scale=(1.0, 1.0), ratio=CROP.ratio)
    image = torch.empty(3, height, width)
    theirs = v2.RandomResizedCrop(8, scale=whole.scale).make_params([image])
    box = random_resized_box(height, width, [0.5] * DRAWS, whole)
    assert box == tuple(theirs[key] for key in ("top", "left", "height", "width"))


def test_boxes_are_spread_as_torchvisions_are():
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(4000, DRAWS, generator=generator).tolist()
    ours = torch.tensor([random_resized_box(375, 500, draw, CROP) for draw in draws]).double()
    torch.manual_seed(1)
    transform, image = v2.RandomResizedCrop(224), torch.empty(3, 375, 500)
    keys = ("top", "left", "height", "width")
    params = [transform.make_params([image]) for _ in range(4000)]
    theirs = torch.tensor([[p[key] for key in keys] for p in params]).double()
    assert ((ours[:, 0] + ours[:, 2]) <= 375).all() and ((ours[:, 1] + ours[:, 3]) <= 500).all()
    # Means and deviations within four standard errors.
    tolerance = 4 * theirs.std(0) * (2 / 4000) ** 0.5
    assert ((ours.mean(0) - theirs.mean(0)).abs() < tolerance).all()
    assert ((ours.std(0) - theirs.std(0)).abs() < tolerance).all()


def test_a_view_is_a_crop_of_its_image_resized_flipped_and_normalised(suite, images):
    """Each view equals the crop that Pillow makes of the box of its draws."""
    batches = training_batches(images[0], suite, 0, 2)
    tasks = list(batches._tasks(0))
    flips = 0
    for (views, labels), task in zip(batches.epoch(0), tasks, strict=True):
        assert views.shape == (2, 8, 3, 32, 32) and views.dtype == torch.float32
        assert views[0].is_contiguous(memory_format=torch.channels_last)
        assert labels.tolist() == images[0].labels[task.positions].tolist()
        for view, column in product(range(2), range(8)):
            draws = task.draws[view, column].tolist()
            encoded = images[0].read(task.positions[column])
            picture = Image.open(io.BytesIO(encoded))
            top, left, height, width = random_resized_box(*picture.size[::-1], draws, CROP)
            crop = picture.crop((left, top, left + width, top + height))
            crop = crop.resize((32, 32), Image.Resampling.BILINEAR)
            flipped = draws[-1] < 0.5
            flips += flipped
            expected = normalised(suite, np.asarray(crop)[:, ::-1] if flipped else np.asarray(crop))
            assert (views[view, column] - expected).abs().max() < 0.03  # two grey levels
    assert 8 < flips < 24


def test_views_and_samples_have_independent_crops_and_flips_can_be_disabled(suite, images):
    batches = training_batches(images[0], suite, 0, 3)
    draws = torch.tensor(np.stack([task.draws for task in batches._tasks(0)])).flatten(0, 2)
    assert len(draws[:, 0].unique()) == len(draws) == 2 * 3 * 8
    assert 0.2 < (draws[:, -1] < 0.5).float().mean() < 0.8
    augmentation = suite.augmentation.model_copy(update={"horizontal_flip": False})
    upright = suite.model_copy(update={"augmentation": augmentation})
    tasks = list(training_batches(images[0], upright, 0, 3)._tasks(0))
    assert all((task.draws[:, :, -1] >= 0.5).all() for task in tasks)


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


def test_an_epoch_visits_distinct_images_in_whole_batches(suite, images):
    tasks = list(training_batches(images[0], suite, 0, 1)._tasks(0))
    positions = np.concatenate([task.positions for task in tasks])
    assert len(training_batches(images[0], suite, 0, 1)) == len(tasks) == TRAIN // 8
    assert len(np.unique(positions)) == len(positions) == 16


def test_large_batches_are_many_tasks_and_come_back_in_order(suite, images, monkeypatch):
    whole = epoch(images[0], suite, views=2)
    monkeypatch.setattr("kdbench.data.encoded.batches.TASK_SIZE", 3)
    assert same(epoch(images[0], suite, views=2), whole)


@pytest.mark.parametrize("processes", [2, 4])
def test_the_slices_of_all_processes_make_the_global_batch(suite, images, processes):
    parts = [
        epoch(images[0], suite, views=2, rank=r, processes=processes) for r in range(processes)
    ]
    for whole, *slices in zip(epoch(images[0], suite, views=2), *parts, strict=True):
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
    # A pass that was given up leaves nothing of itself in the next.
    next(batches.epoch(0))
    assert same(list(batches.epoch(1)), epoch(train, suite, 1, views=2))


def test_two_simultaneous_passes_are_refused(suite, images):
    batches = training_batches(images[0], suite, 0, 1)
    first = batches.epoch(0)
    next(first)
    with pytest.raises(RuntimeError, match="has not finished"):
        next(batches.epoch(1))


@pytest.fixture
def damaged(suite) -> tuple[EncodedImages, EncodedImages]:
    """No images are 0 and 4, one after the other in class 0, 9 in the middle of class 1, 19 at the
    end of class 3; nor is 6 of the test images.
    """
    rows = content()
    for split, index in (
        ("train", 0),
        ("train", 4),
        ("train", 9),
        ("train", 19),
        ("validation", 6),
    ):
        rows[split][index] = (b"no image", index % CLASSES)
    return opened(suite, write_saved(Path("damaged"), rows))


def test_an_undecodable_image_is_replaced_by_one_of_its_class(suite, images, damaged):
    batches = training_batches(damaged[0], suite, 0, 1)
    reader, stand_in = images[0].reader, {0: 8, 4: 8, 9: 13, 19: 3}

    class Replaced:
        def read(self, row: int) -> bytes:
            return reader.read(stand_in.get(row, row))

    expected = epoch(replace(images[0], reader=Replaced()), suite)
    assert same(list(batches.epoch(0)), expected)
    list(batches.epoch(1))
    reason = "it is not in a known image format"
    names = {f"train: row {row} (photo{row}.jpg)" for row in stand_in}
    assert batches.undecodable == dict.fromkeys(names, reason)


def test_undecodable_images_have_an_ignored_label_in_evaluation(suite, damaged):
    evaluation = evaluation_batches(damaged[1], suite)
    pixels, labels = (torch.cat(part) for part in zip(*evaluation, strict=True))
    assert labels.tolist() == [IGNORE_INDEX if i == 6 else i % CLASSES for i in range(TEST)]
    assert (pixels[6] - normalised(suite, np.full((32, 32, 3), 128, np.uint8))).abs().max() < 1e-5
    assert list(evaluation.undecodable) == ["validation: row 6 (photo6.jpg)"]
    replaced = evaluation_batches(damaged[1], suite, substitute=True)
    assert torch.cat([labels for _, labels in replaced]).tolist() == [
        i % CLASSES for i in range(TEST)
    ]


def test_a_class_without_any_image_ends_the_run(suite):
    rows = content()
    rows["train"] = [(b"none" if label == 1 else image, label) for image, label in rows["train"]]
    train, _ = opened(suite, write_saved(Path("none"), rows))
    with pytest.raises(LoaderError, match="no image of class 1 can be decoded"):
        epoch(train, suite)


def test_the_holdout_is_the_last_of_each_class_without_replacements(suite, images):
    rest, held = images[0].hold_out(0.2)
    assert torch.bincount(held.labels).tolist() == [1] * CLASSES
    assert sorted([*rest.rows.tolist(), *held.rows.tolist()]) == list(range(TRAIN))
    assert held.rows.tolist() == [16, 17, 18, 19]


class Faulty:
    """A reader that calls `fault` before it reads one row."""

    def __init__(self, reader, row: int, fault):
        self.reader, self.row, self.fault = reader, row, fault

    def read(self, row: int) -> bytes:
        if row == self.row:
            self.fault()
        return self.reader.read(row)

    def name(self, row: int) -> str:
        return self.reader.name(row)


def die_once() -> None:
    if not Path("died").exists():
        Path("died").touch()
        os._exit(1)


def hang() -> None:
    time.sleep(60)


def train_baseline(suite, images, folder, accelerator) -> str:
    """Return the reason for which a run failed."""
    (entry,) = find_methods(["baseline"])
    spec = RunSpec(suite, "resnet8", entry, entry.options({}), 0)
    result = run_one(spec, *images, folder, accelerator, Watcher())
    assert result.status == "failed"
    return result.reason


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "reason", "max_seconds"),
    [
        (die_once, "a process that decodes images died", 30),
        (hang, "no image was decoded for 6 seconds", 40),
    ],
)
def test_a_worker_that_dies_or_hangs_fails_the_run_with_its_reason(
    suite, images, accelerator, tmp_path, monkeypatch, fault, reason, max_seconds
):
    monkeypatch.setattr(workers, "POLL_SECONDS", 1)
    monkeypatch.setattr(workers, "TIMEOUT_SECONDS", 6)
    train = replace(images[0], reader=Faulty(images[0].reader, 3, fault), workers=1)
    started = time.monotonic()
    assert reason in train_baseline(suite, (train, images[1]), tmp_path, accelerator)
    assert time.monotonic() - started < max_seconds


def test_a_worker_that_hangs_is_killed_after_the_timeout(suite, images, monkeypatch):
    monkeypatch.setattr(workers, "POLL_SECONDS", 1)
    monkeypatch.setattr(workers, "TIMEOUT_SECONDS", 2)
    train = replace(images[0], reader=Faulty(images[0].reader, 3, hang), workers=1)
    with pytest.raises(LoaderError, match="no image was decoded for 2 seconds"):
        epoch(train, suite)


def test_after_a_worker_died_others_start(suite, images):
    faulty = replace(images[0], reader=Faulty(images[0].reader, 3, die_once), workers=1)
    batches = training_batches(faulty, suite, 0, 1)
    with pytest.raises(LoaderError, match="died"):
        list(batches.epoch(0))
    assert same(list(batches.epoch(1)), epoch(images[0], suite, 1))


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
    victim = next(folder.glob("train/n00000001/*"))
    victim.unlink()
    reason = train_baseline(suite, images, tmp_path, accelerator)
    name = f"{victim.parent.name}/{victim.name}"
    assert reason == f"train: {name} cannot be read: No such file or directory"


LEAVES = """
import builtins, os, signal, sys
from pathlib import Path
import torch
from encoded_data import photo_suite, write_saved
from kdbench.data import locate, training_batches
from kdbench.data.encoded.images import open_encoded

suite = photo_suite()
if __name__ == "__main__":
    write_saved(Path("saved"))
    source = locate(suite.data, Path("saved"))
    images = open_encoded(source, suite.data.train, torch.device("cpu"), 2)
    batches = training_batches(images, suite, seed=0, views=1)
    builtins.kept = batches.epoch(0), batches
    next(builtins.kept[0])
    if "killed" in sys.argv:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.slow
@pytest.mark.parametrize("end", ["ended", "killed"])
def test_a_process_that_ends_within_a_pass_leaves_no_worker(end):
    """Workers ignore SIGTERM, so a handler that sends it and waits would never return."""
    Path("leaves.py").write_text(LEAVES)
    folders = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, "leaves.py", end],
        env=os.environ | {"PYTHONPATH": folders},
        process_group=0,
    )
    try:
        assert process.wait(timeout=100) == (0 if end == "ended" else -signal.SIGKILL)
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
