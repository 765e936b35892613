"""Runs on encoded images: end to end, resumed, with undecodable files, and their messages."""

import gc
import json
import multiprocessing
import time
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import Completing, Watcher, is_one_sentence
from encoded_data import (
    CLASSES,
    TEST,
    TRAIN,
    content,
    opened,
    photo_suite,
    write_folders,
    write_parquet,
    write_saved,
)
from test_invariants import Fixed

from kdbench.data import IGNORE_INDEX
from kdbench.data.encoded import workers
from kdbench.data.encoded.workers import DecodePool
from kdbench.discovery import find_methods
from kdbench.engine import data_stats as data_stats_module
from kdbench.engine import run as run_module
from kdbench.engine.checkpoint import Progress
from kdbench.engine.data_stats import DataStats, waiting_share
from kdbench.engine.evaluate import evaluate
from kdbench.engine.run import Run
from kdbench.engine.spec import RunSpec
from kdbench.results.schema import Cost, Result


@pytest.fixture
def make(accelerator, tmp_path):
    """Return a function that builds a run on the tiny suite, with decoding in this process."""

    def build(images, method="baseline", folder="run", watcher=None, **settings) -> Run:
        (entry,) = find_methods([method])
        spec = RunSpec(photo_suite(), "resnet8", entry, entry.options(settings), 0)
        return Completing(spec, *images, tmp_path / folder, accelerator, watcher or Watcher())

    return build


@pytest.fixture
def photos():
    return opened(photo_suite(), write_saved(Path("saved")))


def result_of(method: str, results: str = "results") -> Result:
    file = Path(results, "photos", "resnet8", method, "seed0.json")
    return Result.model_validate_json(file.read_bytes())


@pytest.mark.slow
def test_two_methods_end_to_end_for_every_layout_and_number_of_workers(kdbench):
    """KDCL has one view per network."""
    photo_suite()
    run = ("run", "--suite", "photos.toml", "--methods", "kdcl,dml")
    write_parquet(Path("parquet"))
    code, out, _ = kdbench(*run, "--data-dir", "parquet", "--workers", "1")
    assert code == 0
    heading = next(line for line in out.splitlines() if "student top-1" in line)
    assert "waiting for data" in heading
    write_saved(Path("saved"))
    assert kdbench(*run, "--data-dir", "saved", "--workers", "0", "--results-dir", "0")[0] == 0
    for method in ("kdcl", "dml"):
        one, other = result_of(method), result_of(method, "0")
        assert one.history == other.history and len(one.history) == 2
        assert one.fingerprint == other.fingerprint and one.status == "finished"
        assert one.notes["images"] == "originals" and "simplejpeg" in one.notes["decoder"]
        assert 0 <= one.cost.waiting_share < 1
        assert "workers" not in one.environment.command
    code, out, _ = kdbench(*run, "--data-dir", "parquet", "--dry-run")
    assert code == 0 and "0 of 2 runs to do" in out and "parquet in parquet" in out


@pytest.mark.slow
def test_parallel_jobs_read_encoded_data(kdbench):
    photo_suite()
    write_folders(Path("photos"))
    run = ("run", "--suite", "photos.toml", "--methods", "baseline,dml", "--data-dir", "photos")
    assert kdbench(*run, "--jobs", "2", "--workers", "0")[0] == 0
    assert {result_of(method).status for method in ("baseline", "dml")} == {"finished"}


@pytest.mark.slow
def test_two_processes_share_encoded_data(kdbench):
    photo_suite()
    rows = content()
    for split, index in (("train", 3), ("validation", 5)):
        rows[split][index] = (b"no image", index % CLASSES)
    write_folders(Path("photos"), rows)
    run = ("run", "--suite", "photos.toml", "--methods", "kdcl", "--data-dir", "photos")
    alone = ("--workers", "0", "--results-dir", "one", "--runs-dir", "runs-one")
    assert kdbench(*run, *alone)[0] == 0
    assert kdbench(*run, "--workers", "1", "--num-processes", "2")[0] == 0
    one, two = result_of("kdcl", "one"), result_of("kdcl")
    assert two.environment.processes == 2
    assert two.notes == one.notes and two.notes["undecodable images"] == 2
    for mine, theirs in zip(two.history, one.history, strict=True):
        assert mine.learning_rate == theirs.learning_rate
        # Batch normalisation sees four images at a time in place of eight.
        assert mine.losses == pytest.approx(theirs.losses, rel=0.1, abs=0.01)
        hits = mine.metrics["student"].top1 * TEST / 100
        assert hits == pytest.approx(round(hits), abs=1e-9)  # each test image counts once


DOES = """
import multiprocessing, os, signal
from kdbench.methods.baseline import Baseline

class Does(Baseline):
    def forward(self, views, labels):
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.{signal})
        return super().forward(views, labels)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signal", "reason"),
    [("SIGKILL", "a process that decodes images died"), ("SIGSTOP", "was decoded for 6 seconds")],
)
def test_workers_that_die_or_hang_fail_one_run_of_the_plan(kdbench, monkeypatch, signal, reason):
    monkeypatch.setattr(workers, "POLL_SECONDS", 1)
    monkeypatch.setattr(workers, "TIMEOUT_SECONDS", 6)
    photo_suite()
    smaller = Path("photos.toml").read_text().replace("\nbatch_size = 8", "\nbatch_size = 2")
    Path("photos.toml").write_text(smaller)  # more batches than are decoded ahead
    Path("does.py").write_text(DOES.format(signal=signal))
    folder = str(write_folders(Path("photos")))
    run = ("run", "--suite", "photos.toml", "--methods", "./does.py,baseline", "--workers", "1")
    code, out, err = kdbench(*run, "--data-dir", folder)
    assert code == 1 and "Traceback" not in err
    assert "does resnet8 seed 0 failed: " in err and reason in err and "1 failed" in out
    assert result_of("does").status == "failed" and reason in (result_of("does").reason or "")
    assert result_of("baseline").status == "finished"
    gc.collect()  # what the command is made of ends with it; here the process goes on
    assert not multiprocessing.active_children()
    server = psutil.Process(forkserver._forkserver._forkserver_pid)
    assert not server.children()  # nor one that is dead and that nobody waited for


@pytest.mark.slow
def test_a_step_is_timed_on_noise_of_the_size_of_the_crops(kdbench):
    photo_suite()
    bench = ("bench", "--suite", "photos.toml", "--methods", "dml", "--rounds", "1")
    code, out, _ = kdbench(*bench, "--compile", "off", "--format", "json")
    (row,) = json.loads(out)["rows"]
    assert code == 0 and (row["method"], row["views"]) == ("dml", 1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--workers", "-1"), "--workers must be at least 0, not -1"),
        (("--data-dir", "nowhere"), "'nowhere' does not exist"),
        (("--data-dir", "."), "not found in"),
    ],
)
def test_a_mistake_prints_one_sentence(kdbench, options, words):
    photo_suite()
    code, _, error = kdbench("run", "--suite", "photos.toml", "--methods", "dml", *options)
    assert code == 2 and is_one_sentence(error) and words in error


@pytest.mark.parametrize("save_seconds", [300, -1])  # after each epoch, after each step
def test_a_killed_run_ends_with_the_same_numbers(make, photos, monkeypatch, save_seconds):
    whole = make(photos, "kdcl", "whole")
    expected = whole.train()
    monkeypatch.setattr(run_module, "SAVE_SECONDS", save_seconds)
    for stop in (1, 3):  # in the first epoch, then in the second
        with pytest.raises(KeyboardInterrupt):
            make(photos, "kdcl", "killed", Watcher(stop_after=stop)).train()
    resumed = make(photos, "kdcl", "killed")
    assert resumed.train().history == expected.history
    states = (run.method.state_dict().values() for run in (whole, resumed))
    assert all(torch.equal(*pair) for pair in zip(*states, strict=True))


def test_a_checkpoint_within_an_epoch_keeps_the_workers(make, photos, monkeypatch):
    started: list[DecodePool] = []
    start = DecodePool._make_loader
    monkeypatch.setattr(DecodePool, "_make_loader", lambda p: started.append(p) or start(p))
    monkeypatch.setattr(run_module, "SAVE_SECONDS", -1)
    make(photos, "baseline").train()
    assert len(started) == len(set(map(id, started))) == 2  # to train with, and to evaluate


def test_kdcl_general_holds_images_out(make, photos):
    run = make(photos, "kdcl", variant="general", held_out_share="0.2")
    result = run.train()
    assert result.notes["training images held out"] == CLASSES
    assert len(run.training.images) == TRAIN - CLASSES


def test_undecodable_images_are_reported_once_and_recorded(make):
    rows = content()
    for split, index in (("train", 0), ("validation", 5)):
        rows[split][index] = (b"no image", index % CLASSES)
    damaged = opened(photo_suite(), write_folders(Path("damaged"), rows))
    watcher = Watcher()
    with pytest.raises(KeyboardInterrupt):
        make(damaged, watcher=Watcher(stop_after=4)).train()
    result = make(damaged, watcher=watcher).train()  # goes on from the first epoch
    assert result.notes["undecodable images"] == 2
    first, second = result.notes["undecodable, the first"]
    reason = "it is not in a known image format"
    assert first == f"train: n00000000/n00000000_000.JPEG: {reason}"
    assert second == f"validation: n00000001/n00000001_005.JPEG: {reason}"
    assert not any("decoded" in message for message in watcher.messages)  # said before the kill
    watcher = Watcher()
    make(damaged, folder="other", watcher=watcher).train()
    (message,) = (text for text in watcher.messages if "decoded" in text)
    assert message.startswith("2 images cannot be decoded") and first.split(": ")[1] in message


def test_an_image_with_an_ignored_label_counts_as_wrong_and_has_no_loss():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    labels = logits.argmax(1)
    whole = evaluate(Fixed(student=logits[:5]), [(torch.zeros(5, 3, 2, 2), labels[:5])])["student"]
    labels[5] = IGNORE_INDEX
    metrics = evaluate(Fixed(student=logits), [(torch.zeros(6, 3, 2, 2), labels)])["student"]
    assert (metrics.top1, whole.top1) == (pytest.approx(500 / 6), 100)
    assert metrics.loss == pytest.approx(whole.loss)


def test_data_waiting_time_is_summed_and_much_of_it_warns_once(accelerator):
    training = SimpleNamespace(waited_seconds=0.5, undecodable={})
    said: list[str] = []
    data_stats, progress = DataStats(training, (), accelerator, said.append), Progress()
    for total in (0.5, 2.5, 5.5):
        training.waited_seconds = total
        data_stats.record_waiting(progress, seconds=10)
        progress.training_seconds += 10
    assert progress.waiting_seconds == 5.5 and waiting_share(progress) == 5.5 / 30
    (message,) = said  # 5 % of the first epoch are not much
    assert "20% of the time" in message


def test_data_waiting_time_is_the_maximum_over_processes(monkeypatch):
    others = iter([6.0, 0.0])
    monkeypatch.setattr(data_stats_module, "gather_object", lambda own: [*own, next(others)])
    training = SimpleNamespace(waited_seconds=0.0, undecodable={})
    said: list[str] = []
    two = SimpleNamespace(num_processes=2)
    data_stats, progress = DataStats(training, (), two, said.append), Progress()
    for total in (0.0, 3.0):
        training.waited_seconds = total
        data_stats.record_waiting(progress, seconds=10)
    assert progress.waiting_seconds == 6.0 + 3.0
    assert len(said) == 1 and "60% of the time" in said[0]


def test_waiting_is_measured_where_the_loader_is_slow_and_not_elsewhere(make, photos, monkeypatch):
    run = make(photos)
    decode = type(run.training._pool.decoder).__getitem__
    delay = 0.2

    def slow(decoder, task):
        time.sleep(delay)
        return decode(decoder, task)

    monkeypatch.setattr(type(run.training._pool.decoder), "__getitem__", slow)
    run.train()
    # Four steps, the first of which starts the workers.
    assert 3 * delay <= run.training.waited_seconds < run.progress.training_seconds


def test_images_in_memory_have_no_waiting(make_run):
    result = make_run("baseline").train()
    assert result.cost.waiting_share is None
    before = json.loads(result.cost.model_dump_json(exclude={"waiting_share"}))
    assert Cost.model_validate(before) == result.cost  # results made before there was a share
