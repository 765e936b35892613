"""Tests of launchers with several processes, and of failures of one process."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from conftest import finish, is_one_sentence
from launched import eventually, free_port, left_here, numbers_of, result_of, status_of
from tiny_data import FIRST, SECOND, write_parquet

from kdbench.paths import SUITES

pytestmark = pytest.mark.slow

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
KDBENCH = ["-m", "kdbench", "run", "--suite", "tiny.toml"]
ONE_FAILS = """
import os, signal, time
from datetime import timedelta
from kdbench.launch import ranks
from kdbench.methods.baseline import Baseline

RANK = int(os.environ.get("RANK", "0"))
ranks.SETTLE = timedelta(seconds={settle})

class {name}(Baseline):
    epoch = 0

    def begin_epoch(self, epoch):
        self.epoch = epoch

    def forward(self, views, labels):
        if self.epoch and {where}:
            {statement}
        return super().forward(views, labels)

def saved():
    deadline = time.monotonic() + 60
    while not os.path.exists(f"runs/tiny/resnet8/{file}/seed0/checkpoint-000000004.pt"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return True
"""
SLOW_DISK = """
from kdbench.engine import run_files

write = run_files.write_checkpoint

def slowly(*checkpoint):
    time.sleep({seconds} if os.path.exists('hold') else 0)
    write(*checkpoint)

run_files.write_checkpoint = slowly
"""
KILLED = "saved() and os.kill(os.getpid(), signal.SIGKILL)"
RAISES = "raise RuntimeError('no luck in /home/somebody/secret.bin')"


ENDS = """
import contextlib, sys, threading
from datetime import timedelta
from torch import distributed
from kdbench.errors import UserError
from kdbench.launch import pulse, ranks

began = threading.Event()

def beat(self):  # as on a slow network: the watcher is in a call of the store at any moment
    began.set()
    with contextlib.suppress(distributed.DistError):
        self._store.wait(["never"], timedelta(milliseconds=2))

pulse.Pulse.beat = beat
ranks.WATCH_SECONDS = ranks.PATIENCE_SECONDS = 0
code = int(sys.argv[1])
with contextlib.suppress(UserError), ranks.together(None, print):
    began.wait()
    if code:
        raise UserError("nothing works")
sys.exit(code if threading.active_count() == 1 else "a thread is left")
"""
"""Two such processes end normally or by an error."""


def write_method(name: str, statement: str, where: str = "RANK == 1", settle: float = 10.0) -> str:
    """`settle` is the time in seconds that other processes wait for a failed one."""
    source = ONE_FAILS.format(
        name=name.title(), file=name, statement=statement, where=where, settle=settle
    )
    Path(f"{name}.py").write_text(source)
    return f"./{name}.py"


def test_a_killed_process_is_reported_and_the_next_run_starts(run_tiny, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    methods = f"{write_method('killed', KILLED)},baseline"
    code, out, err = run_tiny("--methods", methods, "--num-processes", "2", "--jobs", "2")
    assert code == 1 and eventually(lambda: not left_here(), 60)
    reason = "process 1 of 2 was killed by SIGKILL"
    assert err == f"kdbench: killed resnet8 seed 0 failed: {reason}.\n"
    assert out.count("tiny, resnet8") == 1
    lost, made = result_of("killed"), result_of("baseline")
    assert (lost["status"], lost["reason"]) == ("failed", reason)
    assert made["status"] == "finished" and made["cost"]["jobs"] == 2
    for environment in (lost["environment"], made["environment"]):
        threads = torch.get_num_threads()  # OMP_NUM_THREADS says how many each has
        assert (environment["processes"], environment["threads"]) == (2, threads)
        assert environment["command"].endswith("--seeds 1 --num-processes 2")


def test_under_torchrun_one_process_prints_and_a_common_error_does_not_end_the_plan(run_tiny):
    methods = [
        write_method("broken", RAISES, "True"),
        write_method("nan", "views = views * float('nan')"),
        "baseline",
    ]
    code, out, said = finish([*TORCHRUN, *KDBENCH, "--methods", ",".join(methods)])
    assert code != 0
    assert out.count("tiny, resnet8") == 1 and out.count("1 failed") == 1
    reason = "broken.py, line 18: RuntimeError: no luck in secret.bin"
    assert said == [
        f"kdbench: broken resnet8 seed 0 failed: {reason}.",
        "kdbench: nan resnet8 seed 0 diverged: 'ce/student' is nan in epoch 2.",
    ]
    assert result_of("broken")["reason"] == reason
    two = result_of("baseline")
    assert two["status"] == "finished" and two["environment"]["processes"] == 2
    assert run_tiny("--methods", "baseline", "--results-dir", "other", "--runs-dir", "o")[0] == 0
    one = result_of("baseline", results="other")
    assert one["fingerprint"] == two["fingerprint"]
    assert two["last"]["student"]["loss"] == pytest.approx(one["last"]["student"]["loss"], rel=0.02)


def test_under_torchrun_an_error_of_one_process_ends_all_and_is_recorded(kdbench):
    code, out, said = finish(
        [*TORCHRUN, *KDBENCH, "--methods", f"{write_method('raises', RAISES, settle=1)},baseline"]
    )
    assert code != 0 and out == ""
    reason = "raises.py, line 18: RuntimeError: no luck in secret.bin, says process 1 of 2"
    assert len(said) == 1 and f"raises resnet8 seed 0 failed: {reason}; " in said[0]
    failed = result_of("raises")
    assert (failed["status"], failed["reason"]) == ("failed", reason)
    assert [epoch["epoch"] for epoch in failed["history"]] == [1]
    assert not Path("results/tiny/resnet8/baseline").exists()


def test_a_stuck_process_times_out(kdbench):
    Path("impatient.py").write_text(
        "from datetime import timedelta\n"
        "from kdbench.engine import device\n"
        "device.COLLECTIVE_TIMEOUT = timedelta(seconds=20)\n"
        "from kdbench.cli import main\n"
        "main()\n"
    )
    command = [*TORCHRUN, "impatient.py", *KDBENCH[2:], "--methods"]
    code, _, said = finish([*command, write_method("stuck", "time.sleep(100)", settle=1)])
    assert code != 0 and len(said) == 1
    assert "another process is gone, or stuck" in said[0]
    assert result_of("stuck")["status"] == "failed"


def test_after_a_killed_process_the_run_resumes_in_one_process(run_tiny):
    method = write_method("killed", KILLED)
    assert finish([*TORCHRUN, *KDBENCH, "--methods", method])[0] != 0
    log = Path("runs/tiny/resnet8/killed/seed0/log.jsonl")
    first = log.read_text()
    assert first.count("\n") == 1
    code, _, err = run_tiny("--methods", method)
    going_on = "kdbench: killed resnet8 seed 0 resumes after step 4 of 8.\n"
    assert (code, err) == (0, going_on) and log.read_text().startswith(first)
    assert result_of("killed")["environment"]["processes"] == 1


def test_accelerate_launch_with_a_number_of_processes_trains_in_as_many(kdbench):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu"]
    command = [*launcher, "--num_processes", "2", *KDBENCH, "--methods", "baseline"]
    code, out, said = finish([*command, "--num-processes", "2"])
    assert (code, said) == (0, []) and out.count("tiny, resnet8") == 1
    assert result_of("baseline")["environment"]["processes"] == 2


def test_under_torchrun_a_dry_run_shows_the_plan_with_its_obstacles(run_tiny):
    method = Path(write_method("slow", "time.sleep(1)"))
    method.write_text(method.read_text().replace("self.epoch and RANK == 1", "True"))
    file = Path("results/tiny/resnet8/baseline/seed0.json")
    file.parent.mkdir(parents=True)
    file.write_text("{")
    command = [*TORCHRUN, *KDBENCH, "--methods", f"baseline,./{method}", "--dry-run"]
    code, out, said = finish(command)  # it takes the main process long to time the slow one
    assert code != 0 and "in the way" in out and "1 of 2 runs to do" in out
    assert len(said) == 1 and said[0].startswith(f"kdbench: '{file}' is no valid result")


@pytest.mark.parametrize("code", [0, 2])
def test_watched_processes_keep_their_exit_codes(monkeypatch, code):
    """Without a launcher, the store ends with the first process."""
    alike = {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": free_port()}
    alone = {"MASTER_ADDR": "localhost", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": 1}
    for name, value in (alike | alone).items():  # Accelerate warns where threads are not chosen
        monkeypatch.setenv(name, str(value))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ENDS, str(code)],
            env=os.environ | {"RANK": rank, "LOCAL_RANK": rank, "TORCH_CPP_LOG_LEVEL": "ERROR"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    said = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [code, code], said
    assert said == ["", ""]


def test_machines_need_no_shared_disk(run_tiny):
    method = write_method("stops", KILLED, "os.path.exists('kill')")
    Path("kill").touch()
    command = [sys.executable, *KDBENCH, "--methods", method]
    assert finish(command)[0] == -signal.SIGKILL  # leaves a checkpoint, here alone
    Path("kill").unlink()
    other = Path("other")
    other.mkdir()
    for file in ("tiny.toml", "stops.py"):
        (other / file).write_text(Path(file).read_text())
    rendezvous = [f"--master-port={free_port()}", "--master-addr=localhost", "--nnodes=2"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *rendezvous, "--nproc-per-node=1"]
    with subprocess.Popen(
        [*launcher, "--node-rank=1", *command[1:]], cwd=other, stdout=subprocess.PIPE
    ) as second:
        code, out, said = finish([*launcher, "--node-rank=0", *command[1:]])
        silence = second.communicate(timeout=60)[0]
    going_on = "kdbench: stops resnet8 seed 0 resumes after step 4 of 8."
    assert (code, said, silence) == (0, [going_on], b"") and out.count("tiny, resnet8") == 1
    result = result_of("stops")
    assert result["environment"]["processes"] == 2
    assert [epoch["epoch"] for epoch in result["history"]] == [1, 2]
    assert not (other / "results").exists() and not (other / "runs").exists()


def test_processes_with_different_or_missing_data_are_reported(kdbench):
    folder, other = write_parquet(Path("data0")), write_parquet(Path("data1"))
    for mine, theirs in ((FIRST, SECOND), (SECOND, FIRST)):  # the same images in another order
        (other / theirs).write_bytes((folder / mine).read_bytes())
    text = (SUITES / "digits.toml").read_text()
    for old, new in (
        (r"embedded = .*", 'hub = "nobody/nothing"'),
        (r"sha256 = .*", ""),
        ("= 1437", "= 40"),
        ("= 360", "= 20"),
        ("= 64", "= 20"),
    ):
        text = re.sub(old, new, text)
    Path("folders.toml").write_text(text)
    run = f"exec {sys.executable} -m kdbench run --suite folders.toml --methods baseline --epochs 1"
    for folder, words in (
        ("data$RANK", "Processes 0 and 1 do not have the same training images of 'digits'; "),
        ("data$((5 * RANK))", "process 1: "),
    ):
        command = [*TORCHRUN, "--no-python", "bash", "-c", f"{run} --data-dir {folder}"]
        code, out, said = finish(command)
        assert code != 0 and out == ""
        assert len(said) == 1 and said[0].startswith(f"kdbench: {words}"), said
    assert not Path("results").exists() or not list(Path("results").rglob("*.json"))


def started(method: str) -> tuple[subprocess.Popen, list[psutil.Process]]:
    """Return a run in two processes after its first epoch, and its child processes."""
    process = subprocess.Popen(
        [sys.executable, *KDBENCH, "--methods", method, "--num-processes", "2"],
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    log = Path(f"runs/tiny/resnet8/{Path(method).stem}/seed0/log.jsonl")
    assert eventually(lambda: log.exists() and log.read_text().count("\n") == 1)
    ranks = psutil.Process(process.pid).children(recursive=True)
    assert len(ranks) == 3  # a launcher and two processes
    return process, ranks


def test_no_process_outlives_a_killed_command(kdbench):
    Path("hold").touch()
    holds = "while os.path.exists('hold'): time.sleep(0.05)"
    process, ranks = started(write_method("holds", holds, "True"))
    process.kill()
    process.communicate()
    assert eventually(lambda: not any(rank.is_running() for rank in ranks), 60)
    Path("hold").unlink()


@pytest.mark.parametrize(
    ("number", "code", "disk"), [(signal.SIGINT, 130, 0), (signal.SIGTERM, 143, 5)]
)
def test_two_processes_stop_after_a_step_and_resume(run_tiny, number, code, disk):
    """The parameter is the time in seconds that a checkpoint takes."""
    holds = "time.sleep(2 if os.path.exists('hold') else 0)"
    method = write_method("holds", holds, "True")
    with Path(method).open("a") as source:
        source.write(SLOW_DISK.format(seconds=disk))
    Path("hold").touch()
    process, ranks = started(method)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert is_one_sentence(err) and "0 of 1 runs are done" in err
    assert eventually(lambda: not any(rank.is_running() for rank in ranks), 60)
    Path("hold").unlink()
    left = status_of("holds")
    assert left.state == "stopped" and 4 < left.step < 8
    for place in ([], ["--results-dir", "whole", "--runs-dir", "other"]):
        assert run_tiny("--methods", method, "--num-processes", "2", *place)[0] == 0
    assert status_of("holds").first_step == left.step + 1
    assert numbers_of("holds") == numbers_of("holds", results="whole")
