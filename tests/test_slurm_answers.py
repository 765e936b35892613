"""Tests of Slurm's answers and of Slurm tasks, with fake Slurm commands."""

import os
import signal
import sys
from pathlib import Path

import pytest
from conftest import is_one_sentence
from launched import folder_of, result_of, status_of

from kdbench.discovery import find_methods
from kdbench.engine.spec import RunSpec
from kdbench.engine.stop import Stop
from kdbench.errors import UserError
from kdbench.launch import died, slurm
from kdbench.launch.dispatch import prepare, read_order, record
from kdbench.launch.execution import Execution
from kdbench.launch.status import change_status
from kdbench.launch.submission import Submission, cancel_file, order_file

DOWN = "echo 'slurm: Unable to contact the controller' >&2; exit 1"
PARTITIONS = "echo 'gpu*|1-00:00:00'; echo 'cpu|infinite'"


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
    assert slurm.check_partition(None) == 24 * 60
    assert slurm.check_partition("gpu") == 24 * 60
    assert slurm.check_partition("cpu") is None


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
    answers(scancel='echo "$@" >cancelled')
    slurm.cancel(["12_0", "12_1"])
    assert Path("cancelled").read_text() == "12_0 12_1\n"
    answers(scancel=DOWN)
    with pytest.raises(UserError, match="did not cancel the jobs"):
        slurm.cancel(["12_0"])


def test_an_array_is_submitted_with_the_requested_resources(answers, run_tiny, kdbench):
    pytest.importorskip("submitit")
    answers(sbatch='cp "$(eval echo \\${$#})" sent; echo "Submitted batch job 77"')
    answers(squeue="echo '77_0|PENDING|Resources'; echo '77_1|PENDING|Resources'")
    command = ("--methods", "baseline", "--seeds", "2", "--cluster", "slurm", "--mem", "3G")
    code, out, err = run_tiny(*command, "--dry-run")
    assert (code, err) == (0, "") and "A Slurm array of 2 jobs" in out and "mem=3G" in out
    assert not Path("sent").exists()
    code, out, err = run_tiny(*command)
    assert (code, err) == (0, "") and "Submitted 2 runs to Slurm as job 77" in out
    script = Path("sent").read_text()
    for line in ("--array=0-1", "--mem=3G", "--time=1440", "--requeue"):
        assert f"#SBATCH {line}" in script
    assert f"{sys.executable} -m kdbench.launch.died" in script
    assert "2 queued" in kdbench("status")[1]
    assert "Cancelled 2 runs" in kdbench("cancel")[1]


def test_runs_that_slurm_refuses_print_one_sentence(answers, run_tiny):
    pytest.importorskip("submitit")
    answers(sbatch="echo 'sbatch: error: Invalid qos specification' >&2; exit 1")
    code, _, err = run_tiny("--methods", "baseline", "--cluster", "slurm")
    assert code == 2 and is_one_sentence(err)
    assert "Slurm refused the runs: Invalid qos specification." in err


@pytest.fixture
def sent(suite) -> Path:
    """Return the folder of a submission with one run."""
    (entry,) = find_methods(["baseline"])
    spec = RunSpec(suite, "resnet8", entry, entry.options({}), 0)
    folder = prepare([spec], Execution(Path("results"), Path("runs")))
    record(folder, Submission(cluster="slurm", job="7", runs=1))
    return folder


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
    result = result_of("baseline")
    assert (result["status"], result["reason"]) == ("failed", reason)
    assert (status_of("baseline").state, status_of("baseline").reason) == ("failed", reason)
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
def test_a_task_that_is_stopped_says_whether_it_goes_on(sent, number, cancelled, state, reason):
    task = pytest.importorskip("kdbench.launch.task").Task(order_file(sent, 0))
    stop, asked = Stop(), []
    stop.received.append(number)
    if cancelled:
        cancel_file(sent, 0).touch()
    before = signal.signal(signal.SIGUSR2, lambda *_: asked.append(number))
    try:
        with pytest.raises(SystemExit) as end:
            task._end(read_order(order_file(sent, 0)), stop)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert end.value.code == 143
    assert (status_of("baseline").state, status_of("baseline").reason) == (state, reason)
    assert asked == ([number] if state == "queued" else [])


def test_a_task_trains_its_run(sent):
    pytest.importorskip("kdbench.launch.task").Task(order_file(sent, 0))()
    assert result_of("baseline")["status"] == "finished"
    assert status_of("baseline").state == "finished"
