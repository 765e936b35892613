"""Tests of concurrent runs: equal numbers, notes, and the effect of kills."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from conftest import is_one_sentence
from launched import KILLED, eventually, folder_of, left_here, result_of, status_of, write_method
from made_results import metrics

from kdbench.engine.device import make_accelerator
from kdbench.engine.result_builder import empty_result
from kdbench.engine.spec import RunSpec
from kdbench.errors import UserError
from kdbench.launch import child, estimate, status
from kdbench.launch.child import Child
from kdbench.launch.display import Display
from kdbench.launch.execution import Execution
from kdbench.launch.order import WorkOrder
from kdbench.launch.plan import PlannedRun, at_a_time, make_specs
from kdbench.launch.shares import Shares
from kdbench.launch.status import StatusReporter, read_status
from kdbench.results.files import write_result
from kdbench.results.schema import Epoch
from kdbench.suite.load import load_suite

HOLDS = "time.sleep(2 if self.epoch and Path('hold').exists() and time.monotonic() < END else 0)"
QUITS = "print('cannot open /home/somebody/secret.bin'); sys.exit(3)"


@pytest.fixture
def spec(suite) -> RunSpec:
    return make_specs(suite, ["dml"], ["resnet8"], 2, ["dml.temperature=3"])[1]


@pytest.fixture
def held(kdbench) -> str:
    """Two methods whose runs wait in their second epoch while the file `hold` exists."""
    Path("hold").touch()
    return ",".join(write_method(name, HOLDS) for name in ("first", "second"))


def both_wait() -> bool:
    return len(list(Path("runs").rglob("checkpoint-*.pt"))) == 2


def test_parallel_runs_equal_sequential_runs_and_have_no_rates(kdbench, monkeypatch):
    command = ("run", "--suite", "digits", "--epochs", "1", "--methods", "baseline,independent")
    name = "digits@epochs=1"
    assert kdbench(*command, "--results-dir", "alone", "--runs-dir", "other")[0] == 0
    code, out, err = kdbench(*command, "--jobs", "2")
    assert (code, err) == (0, "")
    for method in ("baseline", "independent"):
        alone = result_of(method, suite=name, results="alone")
        shared = result_of(method, suite=name)
        costs = alone.pop("cost"), shared.pop("cost")
        assert shared == alone and [cost["jobs"] for cost in costs] == [1, 2]
        assert all(cost["images_per_second"] > 0 for cost in costs)
        (line,) = (line for line in out.splitlines() if line.split()[:1] == [method])
        assert "shared" in line.split()
        found = status_of(method, suite=name)
        assert found.state == "finished" and found.started < found.updated
        assert (found.epoch, found.epochs, found.step, found.steps) == (1, 1, 22, 22)
        assert found.top1 == shared["last"]["student"]["top1"]
        assert found.loss == sum(shared["history"][0]["losses"].values())
    assert not left_here()
    # A time per step taken from shared runs would be no estimate for one alone.
    monkeypatch.setattr(estimate, "_time_step", lambda spec, device, processes: 100.0)
    _, out, _ = kdbench(*command, "--seeds", "2", "--jobs", "2", "--dry-run")
    assert "2 of 4 runs to do, about 1:13:20" in out
    assert out.endswith("2 at a time; the time is that of one after the other.\n")


@pytest.mark.slow
def test_a_killed_process_is_recorded_and_the_others_continue(run_tiny):
    methods = [write_method("killed", KILLED), write_method("quits", QUITS), "baseline"]
    (spec,) = make_specs(load_suite("tiny.toml"), methods[:1], ["resnet8"])
    write_result(Path("results"), empty_result(spec, make_accelerator(), "failed", "an old reason"))
    code, out, err = run_tiny("--methods", ",".join(methods), "--jobs", "2")
    assert code == 1 and not left_here()
    for method, reason in (
        ("killed", "its process was killed by SIGKILL"),
        ("quits", "its process ended with code 3 and no result: cannot open secret.bin"),
    ):
        assert f"{method} resnet8 seed 0 failed: {reason}." in err
        assert result_of(method)["reason"] == reason
    assert result_of("baseline")["status"] == "finished"
    assert out.count("1 failed") == 2 and status_of("killed").state == "failed"


@pytest.mark.slow
def test_a_user_error_in_a_process_prints_one_sentence_and_ends_the_others(run_tiny):
    Path("hold").touch()
    broken = Path(write_method("broken", "pass"))
    refuses = "import sys\nif 'worker' in sys.argv[0]:\n    raise ImportError('not here')\n"
    broken.write_text(refuses + broken.read_text())  # only the worker meets it
    code, _, err = run_tiny("--methods", f"{broken},{write_method('holds', HOLDS)}", "--jobs", "2")
    assert code == 2
    assert err.startswith("kdbench: ") and "not here" in err.splitlines()[-1]
    assert not left_here() and not list(Path("results").rglob("*.json"))


@pytest.mark.slow
@pytest.mark.parametrize(("number", "expected"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_leaves_no_process_and_the_same_command_resumes(run_tiny, held, number, expected):
    def interrupt() -> None:
        eventually(both_wait)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt).start()
    code, _, err = run_tiny("--methods", held, "--jobs", "2")
    assert code == expected and is_one_sentence(err) and "0 of 2 runs are done" in err
    assert [status_of(method).state for method in ("first", "second")] == ["stopped"] * 2
    assert not left_here() and not list(Path().rglob("*.tmp"))
    Path("hold").unlink()
    log = folder_of("first") / "log.jsonl"
    before = log.read_text()
    assert run_tiny("--methods", held)[0] == 0 and log.read_text().startswith(before)
    # It trained alone in the end, and its windows were timed beside another run all the same.
    assert result_of("first")["cost"]["jobs"] == 2


@pytest.mark.slow
def test_no_process_outlives_a_killed_parent(held):
    command = [sys.executable, "-m", "kdbench", "run", "--suite", "tiny.toml", "--jobs", "2"]
    with subprocess.Popen([*command, "--methods", held]) as parent:
        assert eventually(both_wait)
        parent.kill()
    assert eventually(lambda: not left_here())
    assert [status_of(method).state for method in ("first", "second")] == ["stopped"] * 2


def test_sigterm_is_ctrl_c_and_a_process_that_does_not_end_is_killed(monkeypatch):
    with child.interrupted_by_signals(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)
    monkeypatch.setattr(child, "GRACE_SECONDS", 0.3)
    command = ["sh", "-c", "trap '' TERM; echo; sleep 60"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, process_group=0) as stubborn:
        stubborn.stdout.readline()
        started = Child.__new__(Child)
        started.process, started._asked = stubborn, False
        child.end_all([started])
    assert stubborn.returncode == -signal.SIGKILL


def test_gpus_are_taken_in_turn_and_threads_are_shared(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5, GPU-a")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("kdbench.launch.shares.cores", lambda: 8)
    shares = Shares.among(3)
    environments = [shares.environment(slot) for slot in range(3)]
    assert [each["CUDA_VISIBLE_DEVICES"] for each in environments] == ["5", "GPU-a", "5"]
    assert {each["OMP_NUM_THREADS"] for each in environments} == {"2"}
    assert (shares.on_a_device, Shares.among(2).on_a_device) == (2, 1)
    assert Shares.among(20).threads == 1
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    alone = Shares.among(3)
    assert alone.on_a_device == 3 and alone.threads == torch.get_num_threads()
    assert "CUDA_VISIBLE_DEVICES" not in alone.environment(0)


def test_a_work_order_reproduces_its_run_or_reports_a_change(spec):
    how = Execution(Path("results"), Path("runs"), Path("data"), "off", overwrite=True, jobs=2)
    order = WorkOrder.of(spec, how, jobs=2, parent=17)
    received = WorkOrder.model_validate_json(order.model_dump_json())
    assert received == order and received.spec() == spec
    for change in ({"fingerprint": "of another version"}, {"options": {"temprature": 3}}):
        with pytest.raises(UserError, match="'dml', or kdbench itself, changed after"):
            received.model_copy(update=change).spec()


def epoch_record(number: int) -> Epoch:
    losses, found = {"a": 1.0, "b": 2.0}, {"student": metrics(50.0)}
    return Epoch(epoch=number, learning_rate=0.1, losses=losses, metrics=found)


def test_the_status_is_written_periodically(spec, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(status.time, "monotonic", lambda: clock[0])
    folder = folder_of("dml", 1)
    reporter = StatusReporter(folder, spec)
    found = [status_of("dml", 1)]
    for seconds in (0, 0, 1.1):
        clock[0] += seconds
        reporter.on_step()
        found.append(status_of("dml", 1))
    first, second, third, fourth = found
    assert (first.state, first.step, first.steps) == ("starting", 0, 12)
    # The first step may compile: it is no measure.
    assert (second.state, second.step, second.time_left) == ("running", 1, None)
    assert third == second and (fourth.state, fourth.step) == ("running", 3)
    assert fourth.time_left == (fourth.updated - fourth.measured_since) / 2 * 9
    reporter.on_message("be warned")
    reporter.on_epoch(epoch_record(1), resumed=False)
    reporter.end("finished")
    last = status_of("dml", 1)
    assert (last.state, last.epoch, last.step, last.loss, last.top1) == ("finished", 1, 4, 3, 50)
    assert (last.messages, last.started, last.pid) == (("be warned",), first.started, os.getpid())
    (folder / "status.json").write_text("{")
    assert read_status(folder) is None


def test_the_display_follows_several_runs(spec, tmp_path):
    plan = [PlannedRun(spec, tmp_path / str(seed), "to run") for seed in range(3)]
    assert [at_a_time(plan, jobs) for jobs in (1, 2, 9)] == [1, 2, 3]
    reporter = StatusReporter(tmp_path, spec)
    reporter.on_epoch(epoch_record(2), resumed=True)
    with Display(plan) as display:
        here, there = display.start(spec), display.start(spec)
        here.on_step()
        there.show(reporter.status)
        there.show(reporter.status)
        here.on_step()  # shown with a later one
        overall, *lines = display.progress.tasks
        assert [line.completed for line in lines] == [1, 8]
        assert lines[1].fields["state"] == "2/3  loss 3.000  student 50.00 %"
        assert overall.completed == (1 + 8) * spec.networks
        assert overall.total == 3 * 12 * spec.networks
        here.finish(empty_result(spec, make_accelerator(cpu=True), "failed", "no luck"))
        assert display.progress.tasks[0].completed == (12 + 8) * spec.networks


def test_a_log_has_periodic_lines_and_resumed_steps_do_not_count_for_the_rate(
    tmp_path, spec, monkeypatch, capsys
):
    now = 0.0
    monkeypatch.setattr("kdbench.launch.display.time.monotonic", lambda: now)
    display = Display([PlannedRun(spec, tmp_path, "to run")])
    display.progress.get_time = lambda: now
    run = display.start(spec)
    run.on_epoch(epoch_record(1), resumed=True)
    run.on_resume(5)
    for now in (25.0, 50.0, 75.0, 100.0, 125.0, 150.0):  # noqa: B007, a step each
        run.on_step()
    run.finish(empty_result(spec, make_accelerator(cpu=True), "failed", "no luck"))
    first, second, last = capsys.readouterr().err.splitlines()
    described = "1/3  loss 3.000  student 50.00 %"
    assert first == f"under way: {spec.label}  67%  {described}  (plan 67 %, 0:01:40 left)"
    assert second.startswith(f"under way: {spec.label}  92%")
    assert last == f"failed: {spec.label}  no luck"
