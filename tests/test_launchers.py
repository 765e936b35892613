"""Tests of launchers with several processes, and of failures of one process."""

import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch
from conftest import finish, is_one_sentence
from launched import RUN, eventually, left_here, numbers_of, result_of, status_of, write_method
from tiny_data import FIRST, SECOND, write_parquet

from kdbench.paths import SUITES

pytestmark = pytest.mark.slow

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
IN_ONE = "if self.epoch and os.environ.get('RANK') == '1': "
"""Prefix of what only process 1 does, in the second epoch."""
KILLED = """
        if self.epoch and os.environ.get("RANK") == "1":
            while not list(Path("runs").rglob("checkpoint-000000004.pt")):
                assert time.monotonic() < END
            os.kill(os.getpid(), signal.SIGKILL)
"""
RAISES = "raise RuntimeError('no luck in /home/somebody/secret.bin')"
IMPATIENT = """
from datetime import timedelta
from kdbench.engine import device
device.COLLECTIVE_TIMEOUT = timedelta(seconds=20)
from kdbench import cli
from kdbench.launch import ranks
ranks.SETTLE = timedelta(seconds=1)
cli.main()
"""
SLOW_DISK = """
from kdbench.engine import run_files

write = run_files.write_checkpoint

def slowly(*checkpoint):
    time.sleep({seconds} if Path("hold").exists() else 0)
    write(*checkpoint)

run_files.write_checkpoint = slowly
"""


def under_torchrun(*arguments: str) -> tuple[int, str, list[str]]:
    return finish([*TORCHRUN, *RUN, *arguments])


def test_a_killed_process_is_reported_and_the_next_run_starts(run_tiny):
    methods = f"{write_method('killed', KILLED)},baseline"
    code, out, err = run_tiny("--methods", methods, "--num-processes", "2", "--jobs", "2")
    assert code == 1 and eventually(lambda: not left_here(), 60)
    reason = "process 1 of 2 was killed by SIGKILL"
    assert err == f"kdbench: killed resnet8 seed 0 failed: {reason}.\n"
    assert out.count("tiny, resnet8") == 1
    log = Path("runs/tiny/resnet8/killed/seed0/log.jsonl")
    first = log.read_text()
    assert first.count("\n") == 1
    lost, made = result_of("killed"), result_of("baseline")
    assert (lost["status"], lost["reason"]) == ("failed", reason)
    assert (made["status"], made["cost"]["jobs"]) == ("finished", 2)
    for environment in (lost["environment"], made["environment"]):
        threads = torch.get_num_threads()  # OMP_NUM_THREADS says how many each has
        assert (environment["processes"], environment["threads"]) == (2, threads)
        assert environment["command"].endswith("--seeds 1 --num-processes 2")
    going_on = "kdbench: killed resnet8 seed 0 resumes after step 4 of 8.\n"
    assert run_tiny("--methods", "./killed.py")[::2] == (0, going_on)  # in one process
    assert log.read_text().startswith(first)
    assert result_of("killed")["environment"]["processes"] == 1


def test_under_torchrun_one_process_prints_and_a_common_error_does_not_end_the_plan(run_tiny):
    broken = write_method("broken", f"if self.epoch: {RAISES}")
    nan = write_method("nan", f"{IN_ONE}views = views * float('nan')")
    code, out, said = under_torchrun(f"{broken},{nan},baseline")
    assert code != 0
    assert out.count("tiny, resnet8") == 1 and out.count("1 failed") == 1
    reason = "broken.py, line 15: RuntimeError: no luck in secret.bin"
    assert said == [
        f"kdbench: broken resnet8 seed 0 failed: {reason}.",
        "kdbench: nan resnet8 seed 0 diverged: 'ce/student' is nan in epoch 2.",
    ]
    assert result_of("broken")["reason"] == reason
    two = result_of("baseline")
    assert two["status"] == "finished" and two["environment"]["processes"] == 2
    assert run_tiny("--methods", "baseline")[0] == 0  # does not train what has its fingerprint
    assert result_of("baseline") == two


FAILURES = {
    "raises": (RAISES, "raises.py, line 15: RuntimeError: no luck in secret.bin, says process 1"),
    "stuck": ("time.sleep(100)", "another process is gone, or stuck for 0 minutes, says process 0"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_an_error_or_standstill_of_one_process_ends_all_and_is_recorded(kdbench, name):
    statement, reason = FAILURES[name]
    Path("impatient.py").write_text(IMPATIENT)
    methods = f"{write_method(name, IN_ONE + statement)},baseline"
    code, out, said = finish([*TORCHRUN, "impatient.py", *RUN[2:], methods])
    assert code != 0 and out == ""
    assert len(said) == 1 and f"{name} resnet8 seed 0 failed: {reason} of 2; " in said[0]
    failed = result_of(name)
    assert (failed["status"], failed["reason"]) == ("failed", f"{reason} of 2")
    assert [epoch["epoch"] for epoch in failed["history"]] == [1]
    assert not Path("results/tiny/resnet8/baseline").exists()


def test_accelerate_launch_with_a_number_of_processes_trains_in_as_many(kdbench):
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    code, out, said = finish([*launcher, *RUN, "baseline", "--num-processes", "2"])
    assert (code, said) == (0, []) and out.count("tiny, resnet8") == 1
    assert result_of("baseline")["environment"]["processes"] == 2


def test_under_torchrun_a_dry_run_shows_the_plan_with_its_obstacles(run_tiny):
    slow = write_method("slow", "time.sleep(1)")
    file = Path("results/tiny/resnet8/baseline/seed0.json")
    file.parent.mkdir(parents=True)
    file.write_text("{")
    code, out, said = under_torchrun(f"baseline,{slow}", "--dry-run")  # it takes long to time it
    assert code != 0 and "in the way" in out and "1 of 2 runs to do" in out
    assert len(said) == 1 and said[0].startswith(f"kdbench: '{file}' is no valid result")


def test_processes_with_different_or_missing_data_are_reported(kdbench):
    folder, other = write_parquet(Path("data0")), write_parquet(Path("data1"))
    shutil.copy(folder / FIRST, other / SECOND)  # the same images in another order
    shutil.copy(folder / SECOND, other / FIRST)
    text = re.sub("sha256 = .*", "", (SUITES / "digits.toml").read_text())
    text = text.replace('embedded = "digits"', 'hub = "nobody/nothing"')
    for old, new in (("= 1437", "= 40"), ("= 360", "= 20"), ("= 64", "= 20")):
        text = text.replace(old, new)
    Path("folders.toml").write_text(text)
    run = f"exec {sys.executable} -m kdbench run --suite folders.toml --methods baseline --epochs 1"
    for folder, words in (
        ("data$RANK", "Processes 0 and 1 do not have the same training images of 'digits'; "),
        ("data$((5 * RANK))", "process 1: "),
    ):
        command = ["--no-python", "bash", "-c", f"{run} --data-dir {folder}"]
        code, out, said = finish([*TORCHRUN, *command])
        assert code != 0 and out == ""
        assert len(said) == 1 and said[0].startswith(f"kdbench: {words}"), said
    assert not Path("results").exists() or not list(Path("results").rglob("*.json"))


def started(statement: str, more: str = "") -> tuple[subprocess.Popen, list[psutil.Process]]:
    """Return a run of `holds` in two processes after its first epoch, and its child processes."""
    command = [sys.executable, *RUN, write_method("holds", statement, more), "--num-processes", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, process_group=0)
    log = Path("runs/tiny/resnet8/holds/seed0/log.jsonl")
    assert eventually(lambda: log.exists() and log.read_text().count("\n") == 1)
    ranks = psutil.Process(process.pid).children(recursive=True)
    assert len(ranks) == 3  # a launcher and two processes
    return process, ranks


def test_no_process_outlives_a_killed_command(kdbench):
    process, ranks = started("while self.epoch and time.monotonic() < END: time.sleep(0.05)")
    process.kill()
    process.communicate()
    assert eventually(lambda: not any(rank.is_running() for rank in ranks), 60)


@pytest.mark.parametrize(
    ("number", "code", "disk"), [(signal.SIGINT, 130, 0), (signal.SIGTERM, 143, 5)]
)
def test_two_processes_stop_after_a_step_and_resume(run_tiny, number, code, disk):
    """`disk` is the time in seconds that a checkpoint takes."""
    Path("hold").touch()
    holds = "time.sleep(2 if self.epoch and Path('hold').exists() else 0)"
    process, ranks = started(holds, SLOW_DISK.format(seconds=disk))
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert is_one_sentence(err) and "0 of 1 runs are done" in err
    assert eventually(lambda: not any(rank.is_running() for rank in ranks), 60)
    Path("hold").unlink()
    left = status_of("holds")
    assert left.state == "stopped" and 4 < left.step < 8
    for place in ([], ["--results-dir", "whole", "--runs-dir", "other"]):
        assert run_tiny("--methods", "./holds.py", "--num-processes", "2", *place)[0] == 0
    assert status_of("holds").first_step == left.step + 1
    assert numbers_of("holds") == numbers_of("holds", results="whole")
