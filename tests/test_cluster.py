"""Submitted runs: in the background of this machine, invalid requests, fake Slurm commands."""

import os
import signal
import sys
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import is_one_sentence
from launched import PACED, eventually, folder_of, numbers_of, status_of, write_method

from kdbench.engine.stop import Stop
from kdbench.errors import UserError
from kdbench.launch import died, slurm, watch
from kdbench.launch.dispatch import at_its_turn, prepare, read_order, record
from kdbench.launch.execution import Execution
from kdbench.launch.plan import make_specs
from kdbench.launch.slurm import SlurmRequest, minutes
from kdbench.launch.status import RunStatus, Ticket, change_status, write_status
from kdbench.launch.submission import Submission, cancel_file, order_file
from kdbench.signals import handled

NOW = datetime(2020, 1, 1, tzinfo=UTC)
RAISES = "raise ValueError('broken')"
DOWN = "echo 'slurm: Unable to contact the controller' >&2; exit 1"
PARTITIONS = "echo 'gpu*|1-00:00:00'; echo 'cpu|infinite'"
HOW = Execution(Path("results"), Path("runs"))
SUBMISSION = Submission(cluster="slurm", job="7", runs=1)


@pytest.fixture
def send(run_tiny):
    return lambda *arguments: run_tiny("--cluster", "local", *arguments)


def test_background_runs_equal_others_and_a_failure_ends_only_its_run(kdbench, run_tiny, send):
    methods = f"{write_method('raises', RAISES)},baseline"
    code, out, err = send("--methods", methods)
    assert (code, err) == (0, "")
    assert "Submitted 2 runs to the background of this machine" in out and "kdbench cancel" in out
    assert "2 runs: 2 queued." in kdbench("status")[1]
    code, out, _ = send("--methods", methods)
    assert code == 0 and "2 runs already submitted." in out
    code, _, err = run_tiny("--methods", "baseline")
    assert code == 2 and is_one_sentence(err) and "1 run of these were sent to a cluster" in err
    code, watched, _ = kdbench("status", "--watch")  # until all are over
    assert code == 0 and status_of("baseline").state == "finished"
    failed = status_of("raises")
    assert failed.state == "failed" and "ValueError: broken" in failed.reason
    assert "2 runs: 1 failed, 1 finished." in watched and "ValueError: broken" in watched
    assert kdbench("status")[1] == watched  # a line a run, however long
    alone = ("--results-dir", "alone", "--runs-dir", "other")
    assert run_tiny("--methods", "baseline", *alone)[0] == 0
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
    waiting = status_of("third")
    assert (waiting.state, waiting.reason) == ("stopped", "cancelled")
    assert eventually(lambda: status_of("first").reason == "cancelled")
    stopped = status_of("first")
    assert stopped.state == "stopped" and stopped.step >= 1
    assert eventually(lambda: status_of("second").step >= 1)
    stat = Path(f"/proc/{status_of('second').pid}/stat").read_text()
    os.kill(int(stat.rpartition(")")[2].split()[1]), signal.SIGKILL)  # its parent
    assert eventually(lambda: status_of("second").state == "stopped")  # with a checkpoint
    write_status(folder_of("third"), waiting.model_copy(update={"state": "queued", "reason": None}))
    assert "1 lost, 2 stopped" in kdbench("status")[1]
    Path("pace").write_text("0")
    assert "Submitted 1 run " in send("--methods", "./first.py")[1]
    assert kdbench("status", "--watch", "--methods", "first")[0] == 0
    first = status_of("first")
    assert (first.state, first.first_step) == ("finished", stopped.step + 1)


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


def test_times_are_read_as_slurm_reads_them():
    times = {"90": 90, "1:30": 2, "2:00:00": 120, "1-12": 2160, "1-1:30": 1530, "1-0:0:1": 1441}
    assert {text: minutes(text) for text in times} == times


def test_the_time_limit_is_the_users_or_the_partitions():
    assert [SlurmRequest().sbatch(3, limit)["time"] for limit in (600, None)] == [600, 24 * 60]
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
    specs = make_specs(suite, ["baseline"], ["resnet8"])
    assert SUBMISSION.job_of(0) == "7"  # not an array
    folder = folder_of("baseline")
    checkpoint = folder / "checkpoint-000000004.pt"
    for overwrite, step in ((False, 5), (True, 0)):
        write_status(folder, status(step=5, steps=12, top1=50.0, reason="old"))
        checkpoint.touch()
        sent = prepare(specs, replace(HOW, overwrite=overwrite))
        record(sent, SUBMISSION)
        waiting = status_of("baseline")
        assert (waiting.state, waiting.step, waiting.reason) == ("queued", step, None)
        assert waiting.ticket == Ticket(submission=sent.name, task=0)
        order = read_order(order_file(sent, 0))
        # What is to be replaced stays until then: a cluster may refuse it yet.
        assert [order.spec()] == specs and checkpoint.exists()
        for expected in (not overwrite, True):  # its turn comes, and comes again
            assert not at_its_turn(order).overwrite
            assert checkpoint.exists() is expected
            checkpoint.touch()
    write_status(folder, waiting.model_copy(update={"state": "running", "step": 9}))
    record(sent, SUBMISSION)
    assert status_of("baseline").step == 9  # it was faster than the one who sent it


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """Return a function that defines fake Slurm commands as shell scripts."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    (tmp_path / "bin").mkdir()

    def give(**commands: str) -> None:
        for name, text in commands.items():
            file = tmp_path / "bin" / name
            file.write_text(f"#!/bin/sh\n{text}\n")
            file.chmod(0o755)

    # submitit looks for srun; without this fake, a machine without Slurm would fail here.
    give(sbatch=DOWN, sinfo=PARTITIONS, squeue="true", scancel="true", srun="true")
    return give


def test_the_limit_of_a_partition_is_the_time_of_a_run(answers):
    limits = [slurm.check_partition(partition) for partition in (None, "gpu", "cpu")]
    assert limits == [24 * 60, 24 * 60, None]


@pytest.mark.parametrize(
    ("sinfo", "partition", "words"),
    [
        ("echo 'gpu|1:00'; echo 'cpu|1:00'", None, "no default partition; --partition is one of"),
        (PARTITIONS, "gpuu", "Did you mean 'gpu'?"),
        (DOWN, None, r"Slurm does not answer \(slurm: Unable to contact the controller\)"),
        ("exit 3", None, r"Slurm does not answer \(sinfo ended with 3\)"),
    ],
)
def test_an_unavailable_partition_is_reported(answers, sinfo, partition, words):
    answers(sinfo=sinfo)
    with pytest.raises(UserError, match=words):
        slurm.check_partition(partition)


def test_a_slurm_command_that_hangs_times_out(answers, monkeypatch):
    monkeypatch.setattr(slurm, "ANSWER_SECONDS", 0.2)
    answers(sinfo="exec sleep 60")
    with pytest.raises(UserError, match=r"sinfo takes more than 0\.2 s"):
        slurm.check_partition(None)


def test_the_queue_gives_states_with_reasons(answers):
    answers(squeue="echo '12_0|PENDING|Priority'; echo '12_1|RUNNING|None'")
    assert slurm.queue() == {"12_0": "PENDING (Priority)", "12_1": "RUNNING"}
    answers(squeue=DOWN)
    assert slurm.queue() is None


def test_jobs_that_are_not_cancelled_are_reported(answers):
    answers(scancel=DOWN)
    with pytest.raises(UserError, match="did not cancel the jobs"):
        slurm.cancel(["12_0"])


def test_an_array_is_submitted_with_the_requested_resources(answers, run_tiny, kdbench):
    pytest.importorskip("submitit")
    answers(
        sbatch='cp "$(eval echo \\${$#})" sent; echo "Submitted batch job 77"',
        squeue="echo '77_0|PENDING|Resources'; echo '77_1|PENDING|Resources'",
        scancel='echo "$@" >cancelled',
    )
    command = ("--methods", "baseline", "--seeds", "2", "--cluster", "slurm", "--mem", "3G")
    command += ("--partition", "cpu", "--cpus", "2", "--max-parallel", "1")
    code, out, err = run_tiny(*command, "--dry-run")
    assert (code, err) == (0, "") and "A Slurm array of 2 jobs" in out
    assert "partition=cpu, time=1440, cpus_per_task=2, mem=3G, array_parallelism=1." in out
    assert not Path("sent").exists() and not list(Path().rglob("*.json"))
    code, out, err = run_tiny(*command)
    assert (code, err) == (0, "") and "Submitted 2 runs to Slurm as job 77" in out
    script = Path("sent").read_text()
    for line in ("--array=0-1", "--mem=3G", "--time=1440", "--requeue"):
        assert f"#SBATCH {line}" in script
    assert f"{sys.executable} -m kdbench.launch.died" in script
    assert "2 queued" in kdbench("status")[1]
    assert "Cancelled 2 runs" in kdbench("cancel")[1]
    assert Path("cancelled").read_text() == "77_0 77_1\n"


def test_runs_that_slurm_refuses_print_one_sentence(answers, run_tiny):
    pytest.importorskip("submitit")
    answers(sbatch="echo 'sbatch: error: Invalid qos specification' >&2; exit 1")
    code, _, err = run_tiny("--methods", "baseline", "--cluster", "slurm")
    assert code == 2 and is_one_sentence(err)
    assert "Slurm refused the runs: Invalid qos specification." in err


@pytest.fixture
def sent(suite) -> Path:
    """Return the folder of a submission with one run."""
    folder = prepare(make_specs(suite, ["baseline"], ["resnet8"]), HOW)
    record(folder, SUBMISSION)
    return folder


@pytest.fixture
def task(sent):
    return pytest.importorskip("kdbench.launch.task").Task(order_file(sent, 0))


@pytest.mark.parametrize(
    ("code", "log", "reason"),
    [
        ("137", "", "its process was killed by SIGKILL"),
        ("3", "kdbench: no such thing\nTraceback\n", "no such thing"),
        ("3", "no luck\n", "its process ended with code 3 and no result: no luck"),
    ],
)
def test_a_task_whose_process_died_has_a_failed_result(sent, monkeypatch, code, log, reason):
    Path("log").write_text(log)
    monkeypatch.setattr(sys, "argv", ["died", str(order_file(sent, 0)), code, "log"])
    change_status(folder_of("baseline"), "running", None)
    died.main()
    result, found = numbers_of("baseline"), status_of("baseline")
    assert (result["status"], result["reason"]) == ("failed", reason)
    assert (found.state, found.reason) == ("failed", reason)
    Path("results/tiny/resnet8/baseline/seed0.json").unlink()
    died.main()
    assert not list(Path("results").rglob("*.json"))  # how it ended was said


@pytest.mark.parametrize(
    ("number", "cancelled", "state", "reason"),
    [
        (signal.SIGTERM, True, "stopped", "cancelled"),
        (signal.SIGTERM, False, "stopped", "told to by SIGTERM"),
        (signal.SIGUSR2, False, "queued", "goes on when its turn comes again"),
    ],
)
def test_a_task_that_is_stopped_says_whether_it_goes_on(
    sent, task, number, cancelled, state, reason
):
    stop, asked = Stop(), []
    stop.received.append(number)
    if cancelled:
        cancel_file(sent, 0).touch()
    hear = handled((signal.SIGUSR2,), lambda *_: asked.append(number))
    with hear, pytest.raises(SystemExit) as end:
        task._end(read_order(order_file(sent, 0)), stop)
    found = status_of("baseline")
    assert (end.value.code, found.state, found.reason) == (143, state, reason)
    assert asked == ([number] if state == "queued" else [])


def test_a_task_trains_its_run(task):
    task()
    assert numbers_of("baseline")["status"] == status_of("baseline").state == "finished"
