"""Several commands with one plan: each run is trained once, and a dead owner holds none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, finish
from launched import eventually, folder_of, numbers_of, result_of, write_method

from kdbench.engine.spec import RunSpec
from kdbench.launch.child import Child
from kdbench.launch.claim import TakenError, claimed, is_claimed, made_meanwhile
from kdbench.launch.execution import Execution
from kdbench.launch.order import WorkOrder
from kdbench.launch.plan import make_specs
from kdbench.launch.shares import Shares
from kdbench.results.files import write_result

COUNTS = (
    "self.seen = getattr(self, 'seen', None) or next(self.parameters()).sum().item(); "
    "Path(f'trained-{self.seen}-{os.getpid()}').touch()"
)
"""The initial weights identify the seed."""
HOW = Execution(Path("results"), Path("runs"))
COMMAND = [sys.executable, "-m", "kdbench", "run", "--suite", "tiny.toml"]


@pytest.fixture
def spec(suite) -> RunSpec:
    return make_specs(suite, ["baseline"], ["resnet8"])[0]


def test_a_run_has_one_owner_and_a_process_skips_a_run_of_another(spec):
    folder = folder_of("baseline")
    assert not is_claimed(folder)
    with claimed(spec, HOW) as made:
        assert made is None and is_claimed(folder)
        with pytest.raises(TakenError, match="baseline resnet8 seed 0 is being trained"):
            claimed(spec, HOW).__enter__()
        child = Child(WorkOrder.of(spec, HOW), Shares.among(1), 0)
        assert eventually(lambda: child.ended)
        with pytest.raises(TakenError):
            child.outcome()
    assert not is_claimed(folder) and not list(Path("results").rglob("*.json"))


def test_a_dead_process_does_not_own_a_run(spec):
    holds = (
        "import sys, time; from filelock import FileLock; lock = FileLock(sys.argv[1]);"
        "lock.acquire(); print('held', flush=True); time.sleep(100)"
    )
    folder = folder_of("baseline")
    folder.mkdir(parents=True)
    command = [sys.executable, "-c", holds, str(folder / "lock")]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as owner:
        assert owner.stdout.readline() == b"held\n"
        assert is_claimed(folder)
        owner.kill()
    with claimed(spec, HOW):
        assert is_claimed(folder)


def test_partial_files_of_a_killed_run_are_removed_by_the_next_owner(spec):
    results = Path("results/tiny/resnet8/baseline")
    checkpoint = folder_of("baseline") / ".checkpoint-000000004.pt.17.tmp"
    mine, others = (checkpoint, results / ".seed0.json.17.tmp"), results / ".seed1.json.18.tmp"
    for file in (*mine, others):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("half")
    with claimed(spec, HOW):
        assert not any(file.exists() for file in mine) and others.exists()


def test_results_written_after_the_command_started_are_counted(make_run, spec):
    result = make_run("baseline").train()
    file = write_result(HOW.results, result)
    assert made_meanwhile(spec, HOW) == result
    with claimed(spec, HOW) as made:
        assert made == result
    os.utime(file, (HOW.since - 1, HOW.since - 1))
    assert made_meanwhile(spec, HOW) is None  # the plan knew it, and is to overwrite it
    for change in ({"status": "failed"}, {"fingerprint": "another"}):
        write_result(HOW.results, result.model_copy(update=change))
        assert made_meanwhile(spec, HOW) is None


@pytest.mark.slow
@pytest.mark.parametrize("ways", [((), ()), (("--jobs", "2"), ("--overwrite",))])
def test_two_commands_share_a_plan(ways):
    Path("tiny.toml").write_text(TINY)
    plan = ["--methods", f"{write_method('counts', COUNTS)},independent", "--seeds", "3"]
    started = [subprocess.Popen([*COMMAND, *plan, *way], stdout=subprocess.PIPE) for way in ways]
    tables = [process.communicate(timeout=150)[0].decode() for process in started]
    assert [process.returncode for process in started] == [0, 0]
    assert len(list(Path().glob("trained-*"))) == 3  # each seed by one process
    assert [result_of("counts", seed)["status"] for seed in range(3)] == ["finished"] * 3
    assert all("counts" in table and "independent" in table for table in tables)
    alone = ["--results-dir", "alone", "--runs-dir", "elsewhere"]
    assert finish([*COMMAND, *plan, *alone])[0] == 0
    assert numbers_of("independent", 2) == numbers_of("independent", 2, results="alone")
