"""Runs on encoded images: end to end, resumed, with undecodable files, and their messages."""

import gc
import json
import multiprocessing
import time
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from conftest import Watcher, is_one_sentence
from encoded_data import content, opened, photo_suite, write_folders, write_parquet, write_saved
from launched import result_of, write_method
from test_invariants import Fixed

from kdbench.data import IGNORE_INDEX
from kdbench.data.encoded import workers
from kdbench.data.encoded.workers import DecodePool, Decoder
from kdbench.engine.checkpoint import Progress
from kdbench.engine.data_stats import DataStats, waiting_share
from kdbench.engine.evaluate import evaluate
from kdbench.results.schema import Cost

photos_result = partial(result_of, suite="photos")


@pytest.fixture
def suite():
    return photo_suite()


@pytest.fixture
def images(suite):
    """Images for `make_run`, decoded in this process."""
    return opened(suite, write_folders(Path("photos")))


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
    parallel = ("--workers", "0", "--jobs", "2", "--results-dir", "0")
    assert kdbench(*run, "--data-dir", "saved", *parallel)[0] == 0
    for method in ("kdcl", "dml"):
        one, other = photos_result(method), photos_result(method, results="0")
        assert one["history"] == other["history"] and len(one["history"]) == 2
        assert one["fingerprint"] == other["fingerprint"]
        assert one["status"] == other["status"] == "finished"
        assert one["notes"]["images"] == "originals" and "simplejpeg" in one["notes"]["decoder"]
        assert 0 <= one["cost"]["waiting_share"] < 1
        assert "workers" not in one["environment"]["command"]
    code, out, _ = kdbench(*run, "--data-dir", "parquet", "--dry-run")
    assert code == 0 and "0 of 2 runs to do" in out and "parquet in parquet" in out


@pytest.mark.slow
def test_two_processes_share_encoded_data(kdbench):
    photo_suite()
    write_folders(Path("photos"), content(train=[3], validation=[5]))
    run = ("run", "--suite", "photos.toml", "--methods", "kdcl", "--data-dir", "photos")
    alone = ("--workers", "0", "--results-dir", "one", "--runs-dir", "runs-one")
    assert kdbench(*run, *alone)[0] == 0
    assert kdbench(*run, "--workers", "1", "--num-processes", "2")[0] == 0
    one, two = photos_result("kdcl", results="one"), photos_result("kdcl")
    assert two["environment"]["processes"] == 2
    assert two["notes"] == one["notes"] and two["notes"]["undecodable images"] == 2
    for mine, theirs in zip(two["history"], one["history"], strict=True):
        assert mine["learning_rate"] == theirs["learning_rate"]
        # Batch normalisation sees four images at a time in place of eight.
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=0.1, abs=0.01)
        hits = mine["metrics"]["student"]["top1"] / 10
        assert hits == pytest.approx(round(hits), abs=1e-9)  # each of ten images counts once


HARMS_WORKERS = """import multiprocessing
        for process in multiprocessing.active_children():
            os.kill(process.pid, signal.{})"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signal", "reason"),
    [("SIGKILL", "a process that decodes images died"), ("SIGSTOP", "was decoded for 6 seconds")],
)
def test_workers_that_die_or_hang_fail_one_run_of_the_plan(kdbench, monkeypatch, signal, reason):
    monkeypatch.setattr(workers, "POLL_SECONDS", 1)
    monkeypatch.setattr(workers, "TIMEOUT_SECONDS", 6)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)  # to end one
    photo_suite(batch_size=2)  # more batches than are decoded ahead
    write_method("does", HARMS_WORKERS.format(signal))
    write_folders(Path("photos"))
    run = ("run", "--suite", "photos.toml", "--methods", "./does.py,baseline", "--workers", "1")
    code, out, err = kdbench(*run, "--data-dir", "photos")
    assert code == 1 and "Traceback" not in err
    assert "does resnet8 seed 0 failed: " in err and reason in err and "1 failed" in out
    does = photos_result("does")
    assert does["status"] == "failed" and reason in does["reason"]
    assert photos_result("baseline")["status"] == "finished"
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


def test_a_negative_number_of_workers_is_refused(kdbench):
    photo_suite()
    code, _, error = kdbench("run", "--suite", "photos.toml", "--methods", "dml", "--workers", "-1")
    assert code == 2 and is_one_sentence(error) and "at least 0, not -1" in error


@pytest.mark.parametrize("save_seconds", [300, -1])  # after each epoch, after each step
def test_a_killed_run_ends_with_the_same_numbers(make_run, monkeypatch, save_seconds):
    whole = make_run("kdcl", folder="whole")
    expected = whole.train()
    monkeypatch.setattr("kdbench.engine.run.SAVE_SECONDS", save_seconds)
    for stop in (1, 3):  # in the first epoch, then in the second
        with pytest.raises(KeyboardInterrupt):
            make_run("kdcl", watcher=Watcher(stop_after=stop)).train()
    resumed = make_run("kdcl")
    assert resumed.train().history == expected.history
    states = (run.method.state_dict().values() for run in (whole, resumed))
    assert all(torch.equal(*pair) for pair in zip(*states, strict=True))


def test_a_checkpoint_within_an_epoch_keeps_the_workers(make_run, monkeypatch):
    started: list[DecodePool] = []
    start = DecodePool._make_loader
    monkeypatch.setattr(DecodePool, "_make_loader", lambda p: started.append(p) or start(p))
    monkeypatch.setattr("kdbench.engine.run.SAVE_SECONDS", -1)
    make_run("baseline").train()
    assert len(started) == len(set(map(id, started))) == 2  # to train with, and to evaluate


def test_kdcl_general_holds_images_out(make_run):
    run = make_run("kdcl", variant="general", held_out_share="0.2")
    assert run.train().notes["training images held out"] == 4
    assert len(run.training.images) == 20 - 4


def test_undecodable_images_are_reported_once_and_recorded(make_run):
    first, second = "n00000000/n00000000_000.JPEG", "n00000001/n00000001_005.JPEG"
    for file in (Path("photos/train", first), Path("photos/val", second)):
        file.write_bytes(b"no image")
    before, after = Watcher(stop_after=4), Watcher()
    with pytest.raises(KeyboardInterrupt):
        make_run("baseline", watcher=before).train()
    result = make_run("baseline", watcher=after).train()  # goes on from the first epoch
    assert result.notes["undecodable images"] == 2
    assert result.notes["undecodable, the first"] == [
        f"train: {first}: it is not in a known image format",
        f"validation: {second}: it is not in a known image format",
    ]
    (message,) = (text for text in before.messages + after.messages if "decoded" in text)
    assert message.startswith("2 images cannot be decoded") and first in message


def test_an_image_with_an_ignored_label_counts_as_wrong_and_has_no_loss():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    labels = logits.argmax(1)
    whole = evaluate(Fixed(student=logits[:5]), [(torch.zeros(5, 3, 2, 2), labels[:5])])["student"]
    labels[5] = IGNORE_INDEX
    metrics = evaluate(Fixed(student=logits), [(torch.zeros(6, 3, 2, 2), labels)])["student"]
    assert (metrics.top1, whole.top1) == (pytest.approx(500 / 6), 100)
    assert metrics.loss == pytest.approx(whole.loss)


def record_waiting(device, totals: list[float]) -> tuple[Progress, str]:
    """Record epochs of ten seconds that end with these sums of waiting; return the one warning."""
    training, said = SimpleNamespace(waited_seconds=0.0, undecodable={}), []
    data_stats, progress = DataStats(training, (), device, said.append), Progress()
    for total in totals:
        training.waited_seconds = total
        data_stats.record_waiting(progress, seconds=10)
        progress.training_seconds += 10
    (warning,) = said
    return progress, warning


def test_data_waiting_time_is_summed_and_much_of_it_warns_once(accelerator):
    progress, warning = record_waiting(accelerator, [0.5, 2.5, 5.5])
    assert progress.waiting_seconds == 5.5 and waiting_share(progress) == 5.5 / 30
    assert "20% of the time" in warning  # 5 % of the first epoch are not much


def test_data_waiting_time_is_the_maximum_over_processes(monkeypatch):
    others = iter([6.0, 0.0])
    gather = "kdbench.engine.data_stats.gather_object"
    monkeypatch.setattr(gather, lambda own: [*own, next(others)])
    progress, warning = record_waiting(SimpleNamespace(num_processes=2), [0.0, 3.0])
    assert progress.waiting_seconds == 6.0 + 3.0
    assert "60% of the time" in warning


def test_waiting_is_measured_where_the_loader_is_slow_and_not_elsewhere(make_run, monkeypatch):
    decode, delay = Decoder.__getitem__, 0.2

    def slow(decoder, task):
        time.sleep(delay)
        return decode(decoder, task)

    monkeypatch.setattr(Decoder, "__getitem__", slow)
    run = make_run("baseline")
    run.train()
    # Four steps, the first of which starts the workers.
    assert 3 * delay <= run.training.waited_seconds < run.progress.training_seconds


def test_images_in_memory_have_no_waiting(run_tiny):
    assert run_tiny("--methods", "baseline")[0] == 0
    cost = result_of("baseline")["cost"]
    before = {name: value for name, value in cost.items() if name != "waiting_share"}
    assert cost["waiting_share"] is None
    assert Cost.model_validate(before) == Cost.model_validate(cost)  # made before there was a share
