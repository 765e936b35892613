"""Submitted runs without Slurm: in the background of this machine, and invalid requests."""

import os
import signal
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import is_one_sentence
from launched import PACED, eventually, folder_of, numbers_of, status_of, write_method

from kdbench.discovery import find_methods
from kdbench.engine.spec import RunSpec
from kdbench.errors import UserError
from kdbench.launch import slurm, watch
from kdbench.launch.dispatch import at_its_turn, prepare, read_orders, record
from kdbench.launch.execution import Execution
from kdbench.launch.slurm import SlurmRequest, minutes
from kdbench.launch.status import RunStatus, Ticket, write_status
from kdbench.launch.submission import Submission, has_supervisor, locked

NOW = datetime(2020, 1, 1, tzinfo=UTC)
RAISES = "raise ValueError('broken')"


@pytest.fixture
def send(run_tiny):
    return lambda *arguments: run_tiny("--cluster", "local", *arguments)


def test_background_runs_equal_others_and_a_failure_ends_only_its_run(kdbench, send):
    methods = f"{write_method('raises', RAISES)},baseline"
    code, out, err = send("--methods", methods)
    assert (code, err) == (0, "")
    assert "Submitted 2 runs to the background of this machine" in out and "kdbench cancel" in out
    assert "2 runs: 2 queued." in kdbench("status")[1]
    code, out, _ = send("--methods", methods)
    assert code == 0 and "2 runs already submitted." in out
    code, _, err = kdbench("run", "--suite", "tiny.toml", "--methods", "baseline")
    assert code == 2 and is_one_sentence(err) and "1 run of these were sent to a cluster" in err
    code, watched, _ = kdbench("status", "--watch")  # until all are over
    assert code == 0 and status_of("baseline").state == "finished"
    failed = status_of("raises")
    assert failed.state == "failed" and "ValueError: broken" in failed.reason
    _, out, _ = kdbench("status")
    assert "2 runs: 1 failed, 1 finished." in out and "ValueError: broken" in out
    assert watched == out  # a line a run, however long
    alone = ("--methods", "baseline", "--results-dir", "alone", "--runs-dir", "other")
    assert kdbench("run", "--suite", "tiny.toml", *alone)[0] == 0
    assert numbers_of("baseline") == numbers_of("baseline", results="alone")
    assert "Nothing to submit" in send("--methods", "baseline")[1]


@pytest.mark.slow
def test_cancel_and_a_killed_supervisor_keep_checkpoints(kdbench, send):
    methods = ",".join(write_method(name, PACED) for name in ("first", "second", "third"))
    Path("pace").write_text("1")
    assert send("--methods", methods)[0] == 0
    assert eventually(lambda: status_of("first").step >= 1)
    code, out, _ = kdbench("cancel", "--methods", "first,third")
    assert code == 0 and "Cancelled 2 runs" in out
    assert (status_of("third").state, status_of("third").reason) == ("stopped", "cancelled")
    assert eventually(lambda: status_of("first").reason == "cancelled")
    stopped = status_of("first")
    assert stopped.state == "stopped" and stopped.step >= 1
    assert eventually(lambda: status_of("second").step >= 1)
    stat = Path(f"/proc/{status_of('second').pid}/stat").read_text()
    os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGKILL)  # its parent
    assert eventually(lambda: status_of("second").state == "stopped")  # with a checkpoint
    waiting = status_of("third").model_copy(update={"state": "queued", "reason": None})
    write_status(folder_of("third"), waiting)
    assert "1 lost, 2 stopped" in kdbench("status")[1]
    Path("pace").write_text("0")
    assert "Submitted 1 run " in send("--methods", "./first.py")[1]
    assert kdbench("status", "--watch", "--methods", "first")[0] == 0
    assert status_of("first").state == "finished"
    assert status_of("first").first_step == stopped.step + 1


REFUSED = {
    ("--partition", "main"): "--partition needs --cluster",
    ("--cluster", "local", "--time", "1"): "--time needs --cluster slurm",
    ("--cluster", "local", "--mem", "1G"): "--mem needs --cluster slurm",
    ("--cluster", "local", "--jobs", "2"): "use --max-parallel",
    ("--cluster", "local", "--max-parallel", "0"): "--max-parallel must be at least 1, not 0",
    ("--cluster", "slurm", "--gpus", "2"): "--gpus must be 0 or 1, not 2",
    ("--cluster", "slurm", "--cpus", "0"): "--cpus must be at least 1, not 0",
    ("--cluster", "slurm", "--mem", "16 GB"): "--mem '16 GB' is no amount of memory",
    ("--cluster", "slurm", "--time", "1h"): "--time '1h' is no time",
    ("--cluster", "slurm", "--time", "0"): "--time '0' is no time",
    ("--cluster", "slurm", "--time", "2"): "--time 2 leaves a run no time to train",
    ("--cluster", "slurm"): "There is no Slurm here (no sbatch)",
    ("--cluster", "slurm", "--dry-run"): "There is no Slurm here (no sbatch)",
}


@pytest.mark.parametrize("options", REFUSED)
def test_invalid_requests_print_one_sentence(run_tiny, monkeypatch, options):
    monkeypatch.setattr(slurm.shutil, "which", lambda command: None)
    code, _, err = run_tiny("--methods", "baseline", *options)
    assert code == 2 and is_one_sentence(err) and REFUSED[options] in err
    assert not Path("runs").exists()


def test_without_submitit_the_message_says_how_to_install_it(run_tiny, monkeypatch):
    monkeypatch.setattr(slurm.shutil, "which", lambda command: f"/usr/bin/{command}")
    monkeypatch.setattr(slurm.importlib.util, "find_spec", lambda name: None)
    code, _, err = run_tiny("--methods", "baseline", "--cluster", "slurm")
    assert code == 2 and is_one_sentence(err) and "pip install 'kdbench[slurm]'" in err


def test_status_and_cancel_report_missing_runs_and_unknown_methods(kdbench):
    for command in ("status", "cancel"):
        code, _, err = kdbench(command)
        assert code == 2 and is_one_sentence(err) and "No run has a status in 'runs'" in err
    write_status(folder_of("dml"), status())
    code, _, err = kdbench("cancel", "--methods", "dmll")
    assert code == 2 and is_one_sentence(err) and "No run has the method 'dmll'" in err
    assert "Cancelled 0 runs" in kdbench("cancel")[1]  # nobody submitted it


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("90", 90),
        ("1:30", 2),
        ("2:00:00", 120),
        ("1-12", 2160),
        ("1-1:30", 1530),
        ("1-0:0:1", 1441),
    ],
)
def test_times_are_read_as_slurm_reads_them(text, expected):
    assert minutes(text) == expected


def test_the_time_limit_is_the_users_or_the_partitions():
    assert SlurmRequest().sbatch(3, 600)["time"] == 600
    assert SlurmRequest().sbatch(3, None)["time"] == 24 * 60
    asked = SlurmRequest(time="10", parallel=9, gpus=1).sbatch(3, 600)
    assert (asked["time"], asked["array_parallelism"], asked["gpus_per_node"]) == (10, 3, 1)
    with pytest.raises(UserError, match="more than the 5 minutes"):
        SlurmRequest(time="10").sbatch(3, 5)


def status(**changes) -> RunStatus:
    fresh = RunStatus(state="running", epochs=2, step=2, steps=8, started=NOW, updated=NOW)
    return fresh.model_copy(update=changes)


OLD = NOW - timedelta(minutes=7)
AGAIN = "the same command sends it again, from its last checkpoint"


@pytest.mark.parametrize(
    ("found", "job", "state", "note"),
    [
        (status(), None, "running", ""),
        (status(updated=NOW - timedelta(minutes=2)), None, "running", "no sign of life for 2 min"),
        (status(updated=OLD), None, "lost", f"no sign of life for 7 min; {AGAIN}"),
        (status(updated=OLD, state="queued"), None, "queued", ""),
        (status(updated=OLD, state="finished"), "", "finished", ""),
        (status(state="queued"), "PENDING (Priority)", "queued", "Priority"),
        (status(state="queued"), "", "lost", f"its process is gone, and it left no word; {AGAIN}"),
        (status(), "", "lost", f"its process is gone, and it left no word; {AGAIN}"),
        (status(), "PENDING (BeginTime)", "queued", "BeginTime"),  # its node died
        (status(state="stopped", reason="told to by SIGTERM"), "PENDING", "queued", ""),
        (status(state="stopped", reason="cancelled"), "", "stopped", "cancelled"),
        (status(state="failed", reason="why"), "RUNNING", "failed", "why"),
    ],
)
def test_the_state_of_a_run_combines_its_status_and_the_queue(found, job, state, note):
    assert watch._judge(found, job, NOW) == (state, note)


def test_overwriting_restarts_once_and_a_queued_run_keeps_its_progress(suite):
    (entry,) = find_methods(["baseline"])
    spec = RunSpec(suite, "resnet8", entry, entry.options({}), 0)
    how = Execution(Path("results"), Path("runs"))
    folder = folder_of("baseline")
    for overwrite, step in ((False, 5), (True, 0)):
        write_status(folder, status(step=5, steps=12, top1=50.0, reason="old"))
        (folder / "checkpoint-000000004.pt").touch()
        sent = prepare([spec], replace(how, overwrite=overwrite))
        record(sent, Submission(cluster="slurm", job="7", runs=1))
        waiting = status_of("baseline")
        assert (waiting.state, waiting.step, waiting.reason) == ("queued", step, None)
        assert waiting.ticket == Ticket(submission=sent.name, task=0)
        (order,) = read_orders(sent)
        assert order.spec() == spec
        # What is to be replaced stays until then: a cluster may refuse it yet.
        assert (folder / "checkpoint-000000004.pt").exists()
        for expected in (not overwrite, True):  # its turn comes, and comes again
            assert not at_its_turn(order).overwrite
            assert (folder / "checkpoint-000000004.pt").exists() is expected
            (folder / "checkpoint-000000004.pt").touch()
    write_status(folder, waiting.model_copy(update={"state": "running", "step": 9}))
    record(sent, Submission(cluster="slurm", job="7", runs=1))
    assert status_of("baseline").step == 9  # it was faster than the one who sent it


def test_only_a_living_supervisor_holds_its_lock(tmp_path):
    held = locked(tmp_path)
    assert held is not None and locked(tmp_path) is None and has_supervisor(tmp_path)
    held.close()
    assert not has_supervisor(tmp_path)


def test_a_single_run_is_not_an_array():
    assert Submission(cluster="slurm", job="7", runs=1).job_of(0) == "7"
    assert Submission(cluster="slurm", job="7", runs=2).job_of(1) == "7_1"
