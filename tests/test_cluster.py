"""Runs sent away, as far as no Slurm is needed: on this machine, and what cannot be asked for."""

import os
import signal
from pathlib import Path

import pytest
from conftest import is_one_sentence
from launched import PACED, eventually, numbers_of, status_of, write_method

from kdbench.launch.status import RunStatus, write_status

RAISES = "raise ValueError('broken')"


@pytest.fixture
def send(run_tiny):
    return lambda *arguments: run_tiny("--cluster", "local", *arguments)


def test_runs_in_the_background_equal_others_and_one_that_fails_ends_none(kdbench, send):
    methods = f"{write_method('raises', RAISES)},baseline"
    code, out, err = send("--methods", methods)
    assert (code, err) == (0, "")
    assert "Sent 2 runs to the background of this machine" in out and "kdbench cancel" in out
    assert "2 runs: 2 queued." in kdbench("status")[1]
    code, out, _ = send("--methods", methods)
    assert code == 0 and "2 runs under way already: not sent again." in out
    code, _, err = kdbench("run", "--suite", "tiny.toml", "--methods", "baseline")
    assert code == 2 and is_one_sentence(err) and "1 run of these were sent to a cluster" in err
    assert kdbench("status", "--watch")[0] == 0  # until all are over
    assert status_of("baseline").state == "finished"
    failed = status_of("raises")
    assert failed.state == "failed" and "raises.py, line 13: ValueError: broken" in failed.reason
    _, out, _ = kdbench("status")
    assert "2 runs: 1 failed, 1 finished." in out and "ValueError: broken" in out
    alone = ("--methods", "baseline", "--results-dir", "alone", "--runs-dir", "other")
    assert kdbench("run", "--suite", "tiny.toml", *alone)[0] == 0
    assert numbers_of("baseline") == numbers_of("baseline", results="alone")
    assert "Nothing to send" in send("--methods", "baseline")[1]


def test_cancel_and_the_end_of_the_supervisor_keep_what_was_trained(kdbench, send):
    methods = ",".join(write_method(name, PACED) for name in ("first", "second", "third"))
    Path("pace").write_text("1")
    assert send("--methods", methods)[0] == 0
    assert eventually(lambda: status_of("first").step >= 1)
    code, out, _ = kdbench("cancel", "--methods", "first,third")
    assert code == 0 and "Cancelled 2 runs" in out
    assert (status_of("third").state, status_of("third").reason) == ("stopped", "cancelled")
    assert eventually(lambda: status_of("first").reason == "cancelled", 20)
    stopped = status_of("first")
    assert stopped.state == "stopped" and stopped.step >= 1
    assert eventually(lambda: status_of("second").step >= 1)
    supervisor = os.getpgid(os.getppid())
    parent = Path(f"/proc/{status_of('second').pid}/stat").read_text().rpartition(")")[2].split()[1]
    assert int(parent) != supervisor
    os.kill(int(parent), signal.SIGKILL)
    assert eventually(lambda: status_of("second").state == "stopped", 20)  # with a checkpoint
    write_status(Path("runs/tiny/resnet8/third/seed0"), _waiting(status_of("third")))
    assert "third" in kdbench("status")[1] and "1 lost, 2 stopped" in kdbench("status")[1]
    Path("pace").write_text("0")
    assert "Sent 3 runs" in send("--methods", methods, "--max-parallel", "3")[1]
    assert kdbench("status", "--watch")[0] == 0
    assert "3 runs: 3 finished." in kdbench("status")[1]
    assert status_of("first").first_step == stopped.step + 1
    assert numbers_of("first")["last"] == numbers_of("third")["last"]


def _waiting(status: RunStatus) -> RunStatus:
    return status.model_copy(update={"state": "queued", "reason": None})
