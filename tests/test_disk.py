"""Tests of full, read-only, inaccessible and limited disks.

A run continues with a warning or fails with the reason. Existing files stay intact, and other runs
continue.
"""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import TINY, finish, is_one_sentence
from launched import folder_of, group_exists, numbers_of, result_of, status_of, write_method

from kdbench.atomic import atomic_write
from kdbench.engine import checkpoint
from kdbench.errors import UnwritableError
from kdbench.launch import ranks as ranks_module
from kdbench.launch.place import Place
from kdbench.launch.ranks import Ending, Ranks
from kdbench.results.files import check_writable, iter_results

COMMAND = [sys.executable, "-m", "kdbench", "run", "--suite", "tiny.toml"]
SAVED = (
    "timeout 20 sh -c 'until find . -name checkpoint-000000004.pt | grep -q .; do sleep 0.01; done'"
)
FILLS = f'os.system("{SAVED}; cat /dev/zero 2> /dev/null >> disk/filler") if self.epoch else 0'
"""Fill the disk after the first checkpoint. `>` would first free the filler's space."""
FILLS_UNLESS_DONE = f"assert not Path('done').exists(); {FILLS}"


@contextlib.contextmanager
def mounted(name: str) -> Iterator[Path]:
    """Mount a disk of 3 MiB, which holds a few checkpoints of a ResNet-8."""
    place = Path(name).absolute()
    place.mkdir()
    mounting = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
    done = subprocess.run(mounting, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


@pytest.fixture
def disk():
    with mounted("disk") as place:
        yield place


def files_in(place: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}


def all_whole(folder: Path) -> bool:
    """Check that every file of a run is valid and that there are no incomplete files."""
    logs = folder.rglob("log.jsonl")
    lines = [json.loads(line)["epoch"] for log in logs for line in log.read_text().splitlines()]
    checkpoints = list(folder.rglob("checkpoint-*.pt"))
    read = [checkpoint._read(file, torch.device("cpu")) for file in checkpoints]
    return bool(lines) and None not in read and not list(folder.rglob("*.tmp"))


def test_a_disk_that_fills_up_loses_checkpoints_but_no_run(run_tiny, disk):
    methods = write_method("fills", FILLS), "baseline"
    command = ("--methods", ",".join(methods), "--runs-dir", "disk/runs")
    code, out, err = run_tiny(*command)
    assert code == 1 and "Traceback" not in err
    said = err.splitlines()
    assert len(said) == 2, said
    full = "Cannot write to 'disk/runs/tiny/resnet8/fills/seed0': No space left on device"
    assert said[0].startswith(f"kdbench: {full}. The run continues")
    assert "baseline resnet8 seed 0 failed: Cannot write" in said[1]
    assert result_of("fills")["status"] == "finished" and "1 failed" in out
    assert "No space left on device" in result_of("baseline")["reason"]
    run = disk / "runs/tiny/resnet8/fills/seed0"
    assert all_whole(run) and (run / "checkpoint-000000004.pt").exists()
    (disk / "filler").unlink()
    assert run_tiny(*command)[0] == 0
    roomy = ("--results-dir", "roomy", "--runs-dir", "elsewhere")
    (disk / "filler").mkdir()
    assert run_tiny("--methods", ",".join(methods), *roomy)[0] == 0
    for method in ("fills", "baseline"):
        assert numbers_of(method) == numbers_of(method, results="roomy")


def test_a_result_is_written_once_the_disk_has_room(run_tiny, disk):
    method = write_method("fills", FILLS_UNLESS_DONE)
    command = ("--results-dir", "disk/results", "--seeds", "2")
    code, _, err = run_tiny("--methods", "baseline", *command)
    assert code == 0
    before = files_in(disk)
    code, out, err = run_tiny("--methods", f"{method},baseline", *command)
    assert code == 1 and "Traceback" not in err
    for seed, said in enumerate(err.splitlines()[-2:]):
        assert said.startswith(f"kdbench: fills resnet8 seed {seed} failed: Cannot write '")
        assert said.endswith("No space left on device.")
        assert status_of("fills", seed).state == "failed"
    assert "baseline" in out and all_whole(Path("runs"))
    (disk / "filler").unlink()
    assert files_in(disk) == before
    Path("done").touch()  # no step is trained again
    assert run_tiny("--methods", method, *command)[0] == 0
    assert result_of("fills", 1, results="disk/results")["status"] == "finished"


@pytest.mark.slow
def test_processes_on_a_full_disk_report_the_cause_and_all_end(kdbench, disk):
    # Results have a disk of their own: a checkpoint that fails gives back room enough for one.
    fills_other = "cat /dev/zero 2> /dev/null >> other/filler"
    fills = FILLS.replace("disk/filler", f"disk/filler; {fills_other}")
    methods = ",".join([write_method("first", fills), write_method("second", fills)])
    folders = ["--results-dir", "other/results", "--runs-dir", "disk/runs"]
    with mounted("other") as other:
        process = subprocess.Popen(
            [*COMMAND, "--methods", methods, "--jobs", "2", *folders],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            process_group=0,
        )
        _, err = process.communicate(timeout=150)
        assert process.returncode == 1 and not group_exists(process.pid)
        assert "Traceback" not in err
        for name in ("first", "second"):
            assert f"kdbench: {name} resnet8 seed 0 failed: " in err
        assert all_whole(disk / "runs") and not list(other.rglob("*.json"))


@pytest.mark.slow
def test_processes_that_train_together_and_cannot_write_fail_their_run_alone(run_tiny, disk):
    runs = f"{write_method('fills', FILLS)},baseline"
    command = ("--methods", runs, "--results-dir", "disk/results", "--num-processes", "2")
    code, _, err = run_tiny(*command)
    assert code == 1 and "Traceback" not in err
    for name in ("fills", "baseline"):  # the second one too was trained, and has its checkpoint
        assert f"kdbench: {name} resnet8 seed 0 failed: Cannot write '" in err
        assert (folder_of(name) / "checkpoint-000000008.pt").exists()


def test_a_disk_that_is_full_or_read_only_is_named_before_training(run_tiny, disk):
    (disk / "folder").mkdir()
    subprocess.run("cat /dev/zero > disk/filler 2> /dev/null", shell=True)
    for words in ("No space left on device", "Read-only file system"):
        for option in ("--results-dir", "--runs-dir"):
            code, _, err = run_tiny(option, "disk/folder", "--methods", "baseline")
            assert code == 2 and is_one_sentence(err)
            assert f"Cannot write to 'disk/folder': {words}" in err
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert {file.name for file in disk.rglob("*")} == {"folder", "filler"}


def test_a_disk_that_becomes_read_only_ends_no_run(run_tiny, disk):
    # Over the disk, since its lock is open: what is opened from then on is read-only.
    over = f"mount --bind {disk} {disk} && mount -o remount,bind,ro {disk}"
    once = f"[ -e closed ] || {{ touch closed; {SAVED}; {over}; }}"
    closes = f'os.system("{once}") if self.epoch else 0'
    method = write_method("closes", closes)
    code, _, err = run_tiny("--methods", method, "--runs-dir", "disk/runs")
    subprocess.run(["umount", str(disk)], check=True)
    assert code == 0 and is_one_sentence(err)
    assert "Read-only file system. The run continues" in err
    assert result_of("closes")["status"] == "finished" and all_whole(disk)


@pytest.mark.slow
def test_a_file_size_limit_loses_checkpoints_only(kdbench):
    """A file size limit acts like a quota: results fit, checkpoints do not."""
    limited = ["bash", "-c", 'ulimit -f 256; exec "$@"', "bash", *COMMAND]
    code, _, said = finish([*limited, "--methods", "baseline"], OMP_NUM_THREADS="1")
    assert code == 0
    assert len(said) == 1 and "File too large. The run continues" in said[0]
    free = ["--results-dir", "free", "--runs-dir", "elsewhere"]
    assert finish([*COMMAND, "--methods", "baseline", *free], OMP_NUM_THREADS="1")[0] == 0
    assert numbers_of("baseline") == numbers_of("baseline", results="free")
    assert not list(Path("runs").rglob("*.tmp")) and not list(Path("runs").rglob("*.pt"))


def test_a_quota_error_on_close_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("old")

    def over(_: int) -> None:
        raise OSError(122, "Disk quota exceeded")

    monkeypatch.setattr(os, "fsync", over)
    refusal = r"Cannot write '.*file': Disk quota exceeded\."
    with pytest.raises(UnwritableError, match=refusal), atomic_write(file) as stream:
        stream.write(b"new")
    with pytest.raises(UnwritableError, match=f"Cannot write to '{tmp_path}': Disk quota"):
        check_writable(tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["file"] and file.read_text() == "old"


def test_a_status_that_cannot_be_written_ends_no_run(run_tiny):
    status = f"{folder_of('takes')}/status.json"
    method = write_method("takes", f"os.path.isdir('{status}') or os.remove('{status}')"
                          f" or os.mkdir('{status}')")  # fmt: skip
    code, _, err = run_tiny("--methods", method)
    assert code == 0 and "Traceback" not in err
    assert f"Cannot write to '{folder_of('takes')}': Is a directory. The run continues" in err
    assert result_of("takes")["status"] == "finished"


def test_a_run_whose_folder_is_a_file_fails_alone(run_tiny):
    folder_of("baseline").parent.mkdir(parents=True)
    folder_of("baseline").write_text("a file")
    for jobs in ("1", "2"):
        code, _, err = run_tiny("--methods", "baseline,independent", "--jobs", jobs)
        assert code == 1 and is_one_sentence(err)
        assert "baseline resnet8 seed 0 failed: Cannot write to" in err
        assert result_of("independent")["status"] == "finished"


def test_overwriting_does_not_resume_from_a_checkpoint_that_cannot_be_removed(run_tiny):
    stuck = folder_of("baseline") / "checkpoint-000000004.pt"
    (stuck / "full").mkdir(parents=True)
    code, _, err = run_tiny("--methods", "baseline,independent", "--overwrite")
    assert code == 1 and is_one_sentence(err)
    assert f"Cannot remove '{stuck}': Is a directory" in err
    assert result_of("independent")["status"] == "finished"


def test_an_error_of_all_processes_ends_the_run_on_a_full_disk(monkeypatch):
    codes: list[int] = []
    monkeypatch.setattr(ranks_module, "PATIENCE_SECONDS", 0)
    monkeypatch.setattr(os, "_exit", codes.append)
    said: list[str] = []
    ranks = Ranks(Place(), speak=said.append)

    def full(_: object) -> None:
        raise UnwritableError("write a file", "it is full")

    ranks.on_failure = full
    ranks._end_for(Ending("a process is gone", 1, "gone"))
    assert (codes, said) == ([1], ["a process is gone"])


@pytest.fixture
def subject(tmp_path):
    """Return a function that runs a command without root's override of permissions."""
    drop = "-dac_override,-dac_read_search"
    heeding = ["setpriv", f"--bounding-set={drop}", f"--inh-caps={drop}"] if not os.getuid() else []
    if heeding and not shutil.which("setpriv"):
        pytest.skip("root heeds no permissions, and there is no setpriv")
    probe = Path("closed")
    probe.mkdir(mode=0)
    listed = subprocess.run([*heeding, "ls", str(probe)], capture_output=True)
    if listed.returncode == 0:
        pytest.skip("permissions are not enforced here")
    Path("tiny.toml").write_text(TINY)
    closed: list[tuple[Path, int]] = []

    def run(*arguments: str, closing: Path, mode: int) -> tuple[int, str, list[str]]:
        closed.append((closing, closing.stat().st_mode))
        closing.chmod(mode)
        return finish([*heeding, sys.executable, "-m", "kdbench", *arguments])

    yield run
    for folder, mode in closed:
        folder.chmod(mode)


PLAN = ("run", "--suite", "tiny.toml", "--methods", "baseline,independent")


@pytest.mark.parametrize(
    ("place", "mode"), [("results", 0o555), ("results/tiny/resnet8", 0o000), ("runs", 0o555)]
)
def test_a_folder_without_permission_is_named_before_training(subject, place, mode):
    Path(place).mkdir(parents=True)
    code, out, said = subject(*PLAN, closing=Path(place), mode=mode)
    assert (code, out) == (2, "") and len(said) == 1
    assert f"'{place}" in said[0] and "Permission denied" in said[0]


@pytest.mark.slow
@pytest.mark.parametrize(("jobs", "mode"), [("1", 0o000), ("2", 0o555)])
def test_a_run_whose_folder_is_closed_fails_alone(subject, jobs, mode):
    folder = folder_of("baseline")
    folder.mkdir(parents=True)
    code, _, said = subject(*PLAN, "--jobs", jobs, "--deterministic", closing=folder, mode=mode)
    assert code == 1 and len(said) == 1
    assert said[0].startswith("kdbench: baseline resnet8 seed 0 failed: Cannot write to ")
    assert "Permission denied" in result_of("baseline")["reason"]
    assert result_of("independent")["status"] == "finished"
    for method in ("baseline", "independent"):
        assert result_of(method)["environment"]["deterministic"]


@pytest.mark.slow
def test_a_report_names_a_folder_that_it_may_not_read(subject):
    assert finish([sys.executable, "-m", "kdbench", *PLAN])[0] == 0
    closed = "results/tiny/resnet8/baseline"
    code, out, said = subject("report", closing=Path(closed), mode=0)
    assert code == 2 and "independent" in out
    assert said == [f"kdbench: '{closed}' is not valid and was skipped: Permission denied."]


def test_results_deleted_while_they_are_listed_are_skipped(tmp_path, monkeypatch):
    (tmp_path / "tiny/net/gone").mkdir(parents=True)
    listing = Path.iterdir

    def vanishing(folder: Path):
        found = list(listing(folder))
        if folder.name == "net":
            shutil.rmtree(folder)
        return iter(found)

    monkeypatch.setattr(Path, "iterdir", vanishing)
    assert list(iter_results(tmp_path)) == []
