"""Full, read-only, inaccessible and limited disks: what a run keeps, and what it says."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import finish, is_one_sentence
from launched import folder_of, left_here, numbers_of, result_of, status_of, write_method

from kdbench.atomic import atomic_write
from kdbench.engine import checkpoint
from kdbench.errors import UnwritableError
from kdbench.launch import ranks as ranks_module
from kdbench.launch.place import Place
from kdbench.launch.ranks import Ending, Ranks
from kdbench.results.files import check_writable, iter_results

KDBENCH = [sys.executable, "-m", "kdbench"]
COMMAND = [*KDBENCH, "run", "--suite", "tiny.toml", "--methods"]
PLAN = [*COMMAND, "baseline,independent"]
EXISTS = "until find . -name checkpoint-000000004.pt | grep -q .; do sleep 0.01; done"
SAVED = f"timeout 20 sh -c '{EXISTS}'"
FILLS = f'os.system("{SAVED}; cat /dev/zero 2> /dev/null >> disk/filler") if self.epoch else 0'
"""Fill the disk after the first checkpoint. `>` would first free the filler's space."""


@pytest.fixture
def disk():
    """Mount two disks of 3 MiB, which hold a few checkpoints of a ResNet-8; return the first."""
    places = [Path(name).absolute() for name in ("disk", "other")]
    for place in places:
        place.mkdir()
        mounting = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(place)]
        done = subprocess.run(mounting, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")
    yield places[0]
    subprocess.run(["umount", "--lazy", *places], check=True)


def files_in(place: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in place.rglob("*") if file.is_file()}


def all_whole(folder: Path) -> bool:
    """Check that every file of a run is valid and that there are no incomplete files."""
    lines = [line for log in folder.rglob("log.jsonl") for line in log.read_text().splitlines()]
    epochs = [json.loads(line)["epoch"] for line in lines]
    read = [checkpoint._read(file, torch.device("cpu")) for file in folder.rglob("checkpoint-*.pt")]
    return bool(epochs) and None not in read and not list(folder.rglob("*.tmp"))


def test_a_disk_that_fills_up_loses_checkpoints_but_no_run(run_tiny, disk):
    methods = ("--methods", f"{write_method('fills', FILLS)},baseline")
    code, out, err = run_tiny(*methods, "--runs-dir", "disk/runs")
    assert code == 1 and "1 failed" in out and "Traceback" not in err
    first, second = err.splitlines()
    full = "Cannot write to 'disk/runs/tiny/resnet8/fills/seed0': No space left on device"
    assert first.startswith(f"kdbench: {full}. The run continues")
    assert "baseline resnet8 seed 0 failed: Cannot write" in second
    assert result_of("fills")["status"] == "finished"
    assert "No space left on device" in result_of("baseline")["reason"]
    run = disk / "runs/tiny/resnet8/fills/seed0"
    assert all_whole(run) and (run / "checkpoint-000000004.pt").exists()
    (disk / "filler").unlink()
    assert run_tiny(*methods, "--runs-dir", "disk/runs")[0] == 0
    (disk / "filler").mkdir()  # nothing fills the disk
    assert run_tiny(*methods, "--runs-dir", "elsewhere", "--results-dir", "roomy")[0] == 0
    for method in ("fills", "baseline"):
        assert numbers_of(method) == numbers_of(method, results="roomy")


def test_a_result_is_written_once_the_disk_has_room(run_tiny, disk):
    method = write_method("fills", f"assert not Path('done').exists(); {FILLS}")
    options = ("--results-dir", "disk/results", "--seeds", "2")
    assert run_tiny("--methods", "baseline", *options)[0] == 0
    before = files_in(disk)
    code, out, err = run_tiny("--methods", f"{method},baseline", *options)
    assert code == 1 and "baseline" in out and "Traceback" not in err
    for seed, said in enumerate(err.splitlines()[-2:]):
        assert said.startswith(f"kdbench: fills resnet8 seed {seed} failed: Cannot write '")
        assert said.endswith("No space left on device.")
        assert status_of("fills", seed).state == "failed"
    assert all_whole(Path("runs"))
    (disk / "filler").unlink()
    assert files_in(disk) == before
    Path("done").touch()  # no step is trained again
    assert run_tiny("--methods", method, *options)[0] == 0
    assert result_of("fills", 1, results="disk/results")["status"] == "finished"


@pytest.mark.slow
def test_processes_on_a_full_disk_report_the_cause_and_all_end(kdbench, disk):
    # Results have a disk of their own: a checkpoint that fails gives back room enough for one.
    fills_both = "disk/filler; cat /dev/zero 2> /dev/null >> other/filler"
    fills = FILLS.replace("disk/filler", fills_both)
    methods = ",".join([write_method("first", fills), write_method("second", fills)])
    options = ["--jobs", "2", "--results-dir", "other/results", "--runs-dir", "disk/runs"]
    command = [*COMMAND, methods, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert done.returncode == 1 and not left_here() and "Traceback" not in done.stderr
    for name in ("first", "second"):
        assert f"kdbench: {name} resnet8 seed 0 failed: " in done.stderr
    assert all_whole(disk / "runs") and not list(Path("other").rglob("*.json"))


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
    limited = ["bash", "-c", 'ulimit -f 256; exec "$@"', "bash", *COMMAND, "baseline"]
    code, _, said = finish(limited)
    assert code == 0 and len(said) == 1
    assert "File too large. The run continues" in said[0]
    assert finish([*COMMAND, "baseline", "--results-dir", "free", "--runs-dir", "free"])[0] == 0
    assert numbers_of("baseline") == numbers_of("baseline", results="free")
    assert not list(Path("runs").rglob("*.tmp")) and not list(Path("runs").rglob("*.pt"))


def test_a_quota_error_on_close_keeps_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "file"
    file.write_text("old")
    monkeypatch.setattr(os, "fsync", Mock(side_effect=OSError(122, "Disk quota exceeded")))
    refusal = r"Cannot write '.*file': Disk quota exceeded\."
    with pytest.raises(UnwritableError, match=refusal), atomic_write(file) as stream:
        stream.write(b"new")
    with pytest.raises(UnwritableError, match=f"Cannot write to '{tmp_path}': Disk quota"):
        check_writable(tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["file"] and file.read_text() == "old"


def test_a_status_that_cannot_be_written_ends_no_run(run_tiny):
    status = f"{folder_of('takes')}/status.json"
    replaced = f"os.remove('{status}') or os.mkdir('{status}')"
    method = write_method("takes", f"os.path.isdir('{status}') or {replaced}")
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
    codes, said = [], []
    monkeypatch.setattr(ranks_module, "PATIENCE_SECONDS", 0)
    monkeypatch.setattr(os, "_exit", codes.append)
    ranks = Ranks(Place(), speak=said.append)
    ranks.on_failure = Mock(side_effect=UnwritableError("write a file", "it is full"))
    ranks._end_for(Ending("a process is gone", 1, "gone"))
    assert (codes, said) == ([1], ["a process is gone"])


@pytest.fixture
def subject(kdbench):
    """Return a function that runs a command without root's override of permissions."""
    drop = "-dac_override,-dac_read_search"
    heeding = ["setpriv", f"--bounding-set={drop}", f"--inh-caps={drop}"] if not os.getuid() else []
    if heeding and not shutil.which("setpriv"):
        pytest.skip("root heeds no permissions, and there is no setpriv")
    Path("closed").mkdir(mode=0)
    if subprocess.run([*heeding, "ls", "closed"], capture_output=True).returncode == 0:
        pytest.skip("permissions are not enforced here")

    def run(*arguments: str, closing: Path, mode: int) -> tuple[int, str, list[str]]:
        before = closing.stat().st_mode
        closing.chmod(mode)
        try:
            return finish([*heeding, *arguments])
        finally:
            closing.chmod(before)

    return run


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
def test_a_run_whose_folder_is_closed_fails_alone_and_a_report_names_one(subject, jobs, mode):
    folder = folder_of("baseline")
    folder.mkdir(parents=True)
    code, _, said = subject(*PLAN, "--jobs", jobs, "--deterministic", closing=folder, mode=mode)
    assert code == 1 and len(said) == 1
    assert said[0].startswith("kdbench: baseline resnet8 seed 0 failed: Cannot write to ")
    assert "Permission denied" in result_of("baseline")["reason"]
    assert result_of("independent")["status"] == "finished"
    for method in ("baseline", "independent"):
        assert result_of(method)["environment"]["deterministic"]
    closed = "results/tiny/resnet8/baseline"
    code, out, said = subject(*KDBENCH, "report", closing=Path(closed), mode=0)
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
