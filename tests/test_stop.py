"""Tests of signals: a run stops after its step with a checkpoint."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from conftest import Stopper, Watcher, slow_except
from launched import RUN, eventually, folder_of, numbers_of, status_of, write_method
from torch import distributed

from kdbench.engine import run as run_module
from kdbench.engine import run_files
from kdbench.engine.observer import CompositeObserver
from kdbench.engine.result_builder import DivergedError
from kdbench.engine.run import Run
from kdbench.engine.stop import Stop, StoppedError
from kdbench.errors import UserError
from kdbench.launch import status as status_module
from kdbench.launch.execution import run_one
from kdbench.launch.status import StatusReporter, read_status
from kdbench.results.schema import TRAINED_BEFORE
from kdbench.signals import SIGNALS, ignore_stop_signals


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_interrupts_at_once_unless_a_run_handles_it(number):
    before = signal.getsignal(number)
    stop = Stop()
    with stop.on(*SIGNALS):
        with stop.deferred():
            signal.raise_signal(number)
        assert stop.received == [number] and stop.requested
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert signal.getsignal(number) is before


def test_a_second_ctrl_c_interrupts_a_run_that_handles_the_first():
    stop = Stop()
    with stop.on(*SIGNALS), stop.deferred():
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("spared", [True, False])
def test_data_workers_ignore_signals_to_the_process_group(spared):
    child = os.fork()
    if child == 0:
        if spared:
            ignore_stop_signals()
        for number in SIGNALS[1:]:
            os.kill(os.getpid(), number)
        os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == (7 if spared else -signal.SIGTERM)


def test_a_run_stopped_in_its_evaluation_evaluates_again_and_trains_no_step_twice(make_run):
    expected = make_run("baseline", folder="whole").train()
    stop = Stop()
    run = make_run("baseline", stop=stop)
    first, second, third, *others = run.evaluation

    def asks_after_two():
        yield from (first, second)
        stop.received.append(signal.SIGTERM)
        yield from (third, *others)

    run.evaluation = asks_after_two()
    with pytest.raises(StoppedError):
        run.train()
    watcher = Watcher()
    assert make_run("baseline", watcher=watcher).train().history == expected.history
    assert (watcher.resumed_at, watcher.steps) == (4, 8)


def test_a_result_says_where_it_was_trained_before(make_run):
    alone = make_run("baseline", folder="whole")
    here, whole = alone.hardware, alone.train()
    memory = SimpleNamespace(peak=lambda: 2**60, kind="device")
    there = {"hardware": "another GPU"}
    for steps, place in ((6, there | {"memory": memory}), (1, {}), (2, there)):
        stopper = Stopper(after=steps)
        run = make_run("baseline", watcher=stopper, stop=stopper.stop)
        vars(run).update(place)
        with pytest.raises(StoppedError):
            run.train()
    result = make_run("baseline").train()
    before = [f"another GPU: to step {step} of 12" for step in (6, 9)]
    before.insert(1, f"{here}: to step 7 of 12")
    assert (result.notes, whole.notes) == ({TRAINED_BEFORE: before}, {})
    assert result.history == whole.history
    assert result.cost.peak_memory_kind == "process" and result.cost.peak_memory_bytes < 2**60


@pytest.mark.parametrize("number", slow_except({signal.SIGTERM}, SIGNALS))
def test_a_plan_stopped_within_an_epoch_resumes_there(run_tiny, monkeypatch, number):
    alone = ("--results-dir", "alone", "--runs-dir", "a")
    assert run_tiny("--methods", "baseline", *alone)[0] == 0
    original = CompositeObserver.on_step

    def step_and_signal(observers: CompositeObserver) -> None:
        original(observers)
        os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(CompositeObserver, "on_step", step_and_signal)
        code, _, err = run_tiny("--methods", "baseline")
    assert code == 128 + number and "0 of 1 runs are done" in err and "last checkpoint" in err
    assert (status_of("baseline").state, status_of("baseline").step) == ("stopped", 1)
    planned = run_tiny("--methods", "baseline,dml", "--dry-run")[1]
    assert "goes on after step 1 " in planned and planned.count("to run") == 1
    again = run_tiny("--methods", "baseline", "--dry-run", "--overwrite")[1]
    assert "to run" in again and "goes on" not in again
    going_on = "kdbench: baseline resnet8 seed 0 resumes after step 1 of 8.\n"
    assert run_tiny("--methods", "baseline")[::2] == (0, going_on)
    assert (status_of("baseline").state, status_of("baseline").first_step) == ("finished", 2)
    assert numbers_of("baseline") == numbers_of("baseline", results="alone")


@pytest.fixture
def slow_disk(monkeypatch):
    write = run_files.write_checkpoint
    monkeypatch.setattr(
        run_files, "write_checkpoint", lambda *checkpoint: (time.sleep(0.3), write(*checkpoint))
    )


@pytest.mark.parametrize("after", [6, None])
def test_a_run_ends_once_its_checkpoint_is_written(make_run, tmp_path, slow_disk, after):
    stopper = Stopper(after)
    run = make_run("baseline", watcher=stopper, stop=stopper.stop)
    with contextlib.suppress(StoppedError):
        run.train()
    assert (tmp_path / "run" / f"checkpoint-{after or 12:09d}.pt").exists()


@pytest.mark.slow
@pytest.mark.parametrize("asked", [True, False])
def test_a_run_that_fails_loses_no_checkpoint_that_is_being_written(
    make_run, images, tmp_path, accelerator, slow_disk, monkeypatch, asked
):
    """A launcher whose process dies asks the others to stop."""
    stop, train_epoch = Stop(), Run._train_epoch

    def lost_after_one(run: Run, epoch: int) -> dict[str, float]:
        if epoch == 0:
            return train_epoch(run, epoch)
        stop.received += [signal.SIGTERM] * asked
        raise distributed.DistError("gone")

    monkeypatch.setattr(Run, "_train_epoch", lost_after_one)
    spec, where = make_run("baseline").spec, (tmp_path / "other", accelerator, Watcher())
    with pytest.raises(StoppedError) if asked else contextlib.nullcontext():
        assert run_one(spec, *images, *where, stop=stop).status == "failed"
    assert (tmp_path / "other" / "checkpoint-000000004.pt").exists()


def test_a_failing_checkpoint_does_not_end_the_plan(
    make_run, images, tmp_path, accelerator, monkeypatch
):
    full = Mock(side_effect=MemoryError("no memory"))
    diverges = Mock(side_effect=[None, DivergedError("'ce' is nan in epoch 2")])
    monkeypatch.setattr(run_files, "write_checkpoint", full)
    monkeypatch.setattr(run_module, "check_finite", diverges)
    watcher = Watcher()
    result = run_one(make_run("baseline").spec, *images, tmp_path / "other", accelerator, watcher)
    assert (result.status, result.reason) == ("diverged", "'ce' is nan in epoch 2")
    assert any("was not written: MemoryError('no memory')" in said for said in watcher.messages)


@pytest.mark.slow
def test_two_ctrl_c_end_a_run_whose_disk_hangs(kdbench):
    hangs = "run_files.write_checkpoint = lambda *_: (Path('writing').touch(), time.sleep(100))"
    more = f"from kdbench.engine import run_files\n{hangs}"
    method, log = write_method("held", "pass", more), folder_of("held") / "log.jsonl"
    process = subprocess.Popen([sys.executable, *RUN, method], stderr=subprocess.PIPE, text=True)
    assert eventually(lambda: log.exists() and Path("writing").exists())
    for _ in range(2):
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "0 of 1 runs are done" in said, said


def test_the_status_heartbeat_continues_during_a_long_step(make_run, tmp_path, monkeypatch):
    monkeypatch.setattr(status_module, "HEARTBEAT_SECONDS", 0.01)
    with StatusReporter(tmp_path, make_run("baseline").spec) as reporter:
        begun = reporter.status.updated
        assert eventually(lambda: read_status(tmp_path).updated > begun, 5)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (UserError("The disk is full."), ("failed", "The disk is full.")),
        (StoppedError(), ("stopped", None)),
        (ZeroDivisionError(), ("starting", None)),  # whoever sees the process end says more
    ],
)
def test_a_status_says_why_the_run_was_left(make_run, tmp_path, error, expected):
    with pytest.raises(type(error)), StatusReporter(tmp_path, make_run("baseline").spec):
        raise error
    found = read_status(tmp_path)
    assert (found.state, found.reason) == expected
