"""Runs on a real Slurm that the tests bring up: killed, pre-empted, out of time, cancelled."""

import os
import signal
from pathlib import Path

import pytest
from conftest import is_one_sentence
from controller import Controller, missing
from launched import KILLED, PACED, eventually, folder_of, numbers_of, status_of, write_method

from kdbench.launch import slurm as slurm_module

ALONE = ("--results-dir", "alone", "--runs-dir", "a")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(missing() is not None, reason=f"no Slurm here: {missing()}"),
]


@pytest.fixture(scope="module", autouse=True)
def controller(tmp_path_factory: pytest.TempPathFactory):
    started = Controller(tmp_path_factory.mktemp("slurm"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(started.configuration))
        try:
            started.start()
            yield started
        finally:
            started.stop()


@pytest.fixture
def send(run_tiny):
    return lambda *arguments: run_tiny("--cluster", "slurm", *arguments)


@pytest.fixture
def paced(run_tiny) -> str:
    """A method whose steps take as long as `pace` says, and that was trained without Slurm."""
    method = write_method("paced", PACED)
    Path("pace").write_text("0")
    assert run_tiny("--methods", method, *ALONE)[0] == 0
    return method


def test_an_array_whose_killed_runs_are_recorded_equals_a_local_run(kdbench, run_tiny, send):
    methods = f"baseline,{write_method('killed', KILLED)}"
    code, out, err = send("--methods", methods, "--seeds", "2")
    assert (code, err) == (0, "")
    assert "Submitted 4 runs to Slurm as job" in out and "kdbench status" in out
    code, out, _ = send("--methods", methods, "--seeds", "2")
    assert code == 0 and "4 runs already submitted" in out and "Nothing to submit" in out
    over = {"finished", "failed"}
    runs = [(method, seed) for method in ("baseline", "killed") for seed in (0, 1)]
    assert eventually(lambda: all(status_of(*run).state in over for run in runs), seconds=300)
    reason = "its process was killed by SIGKILL"
    _, out, _ = kdbench("status")
    assert "4 runs: 2 failed, 2 finished." in out and reason in out
    assert run_tiny("--methods", "baseline", "--seeds", "2", *ALONE)[0] == 0
    for seed in (0, 1):
        assert status_of("baseline", seed).state == "finished"
        assert status_of("killed", seed).reason == numbers_of("killed", seed)["reason"] == reason
        assert numbers_of("baseline", seed) == numbers_of("baseline", seed, "alone")


def test_a_pre_empted_run_resumes(controller, kdbench, send, paced):
    """Slurm first preempts by SIGTERM, then sends the signal that submitit requested."""
    Path("pace").write_text("2.5")
    assert send("--methods", paced)[0] == 0
    assert eventually(lambda: status_of("paced").step >= 1)
    whole_node = ("--partition=urgent", "--exclusive", "--output=/dev/null", "--wrap=sleep 2")
    assert "Submitted" in controller.ask("sbatch", *whole_node)
    assert eventually(lambda: status_of("paced").state == "stopped")
    assert eventually(lambda: "1 queued" in kdbench("status")[1])
    first = status_of("paced")
    assert 1 <= first.step < 4  # in the midst of the first epoch

    assert eventually(lambda: status_of("paced").first_step == first.step + 1)
    (job,) = slurm_module.queue()
    controller.ask("scancel", "--signal=USR2", job)
    assert eventually(lambda: status_of("paced").state == "queued")
    second = status_of("paced")
    assert second.step > first.step and second.reason == "goes on when its turn comes again"
    Path("pace").write_text("0")
    assert eventually(lambda: status_of("paced").state == "finished")
    assert status_of("paced").first_step == second.step + 1
    assert numbers_of("paced") == numbers_of("paced", results="alone")


def test_a_run_out_of_time_stops_and_is_resubmitted_by_the_same_command(
    kdbench, send, paced, monkeypatch
):
    monkeypatch.setattr(slurm_module, "REQUEUES", 0)
    monkeypatch.setattr(slurm_module, "SIGNAL_SECONDS", 60)  # Slurm sends it up to 30 s earlier
    Path("pace").write_text("8")
    assert send("--methods", paced, "--time", "2")[0] == 0
    assert eventually(lambda: status_of("paced").state == "stopped", seconds=200)
    stopped = status_of("paced")
    assert stopped.reason == "out of time as often as it may be" and 0 < stopped.step < 8
    assert eventually(lambda: slurm_module.queue() == {})
    assert "1 run: 1 stopped" in kdbench("status")[1]
    Path("pace").write_text("0")
    assert "Submitted 1 run" in send("--methods", paced)[1]
    assert eventually(lambda: status_of("paced").state == "finished")
    assert status_of("paced").first_step == stopped.step + 1
    assert numbers_of("paced") == numbers_of("paced", results="alone")


def test_cancel_ends_running_and_queued_runs(kdbench, send):
    methods = ",".join(write_method(name, PACED) for name in ("first", "second"))
    Path("pace").write_text("1")
    assert send("--methods", methods, "--max-parallel", "1")[0] == 0
    assert eventually(lambda: status_of("first").state == "running")
    assert "1 queued, 1 running" in kdbench("status")[1]
    code, out, _ = kdbench("cancel", "--methods", "second")
    assert code == 0 and "Cancelled 1 run" in out
    first, second = status_of("first"), status_of("second")
    assert (first.state, second.state, second.reason) == ("running", "stopped", "cancelled")
    assert kdbench("cancel")[0] == 0
    # The run notes that it stopped, and its task why.
    assert eventually(lambda: status_of("first").reason == "cancelled")
    assert status_of("first").state == "stopped" and status_of("first").step >= 1
    assert list(folder_of("first").glob("checkpoint-*.pt"))
    assert eventually(lambda: slurm_module.queue() == {})
    assert not list(Path("results").rglob("*.json"))


def test_status_needs_no_slurm_and_a_lost_run_is_resubmitted(
    controller, kdbench, send, monkeypatch
):
    paced = write_method("paced", PACED)
    Path("pace").write_text("4")
    assert send("--methods", paced)[0] == 0
    assert eventually(lambda: status_of("paced").step >= 1)
    with controller.paused("slurmctld"), monkeypatch.context() as patch:
        patch.setattr(slurm_module, "ANSWER_SECONDS", 1)
        patch.setattr(slurm_module, "QUEUE_SECONDS", 1)
        assert "1 run: 1 running." in kdbench("status")[1]
        code, _, err = send("--methods", "baseline")
        assert code == 2 and is_one_sentence(err) and "Slurm does not answer" in err
    (job,) = slurm_module.queue()
    controller.ask("scancel", "--batch", "--signal=KILL", job)  # so that nobody leaves word
    os.kill(status_of("paced").pid, signal.SIGKILL)
    assert eventually(lambda: slurm_module.queue() == {})
    assert "1 lost" in kdbench("status")[1]
    assert "Submitted 1 run" in send("--methods", paced)[1]
    assert kdbench("cancel")[0] == 0


def test_requests_that_slurm_cannot_meet_print_one_sentence(send):
    for option, value, sentence in (
        ("--partition", "mian", "Unknown partition 'mian'. Did you mean 'main'?"),
        ("--time", "3:00:00", "--time 3:00:00 is more than the 120 minutes"),
        ("--constraint", "a100", "Slurm refused the runs: "),
        ("--gpus", "1", "Slurm refused the runs: "),
    ):
        code, _, err = send("--methods", "baseline", option, value)
        assert code == 2 and is_one_sentence(err) and sentence in err
    assert not list(Path("runs").rglob("*.json"))
