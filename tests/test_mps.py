"""Tests of runs that share a GPU, with a fake of NVIDIA's MPS."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launched import eventually, result_of, write_method

from kdbench.launch import mps
from kdbench.launch.mps import CONTROL, LOGS, PIPES, side_by_side
from kdbench.launch.shares import Shares

CONTROLLER = """#!/bin/sh
order="$1"
test -n "$order" || read order
echo "$order in $CUDA_MPS_PIPE_DIRECTORY of ${CUDA_VISIBLE_DEVICES-all}" >> "$(dirname "$0")/orders"
exit "$(cat "$(dirname "$0")/code")"
"""
TAKE_TURNS = "The runs of a GPU take turns on it: "
SHARED = Shares(jobs=2, gpus=("0",), threads=1)


@pytest.fixture
def orders(tmp_path, monkeypatch) -> Path:
    """Return the commands that the fake received; the probe finds it running."""
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / CONTROL
    program.write_text(CONTROLLER)
    program.chmod(0o755)
    (folder / "code").write_text("0")
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    monkeypatch.delenv(PIPES, raising=False)
    monkeypatch.setattr(mps, "DEFAULT_PIPES", tmp_path / "no-service")
    monkeypatch.setattr(mps, "PROBE", ("/bin/sh", "-c", f'test -n "${PIPES}"'))
    return folder / "orders"


def use(shares: Shares) -> tuple[Shares, list[str]]:
    """Return the shares within the context, and the messages."""
    said = []
    with side_by_side(shares, said.append) as given:
        pass
    return given, said


def test_a_service_is_up_while_runs_share_a_gpu(orders):
    said = []
    with side_by_side(SHARED, said.append) as shares:
        environment = shares.environment(0)
        folder = environment[PIPES]
        assert environment[LOGS] == folder and Path(folder).is_dir()
        assert "quit" not in orders.read_text()
    # It numbers GPUs as the runs do, not as this process does.
    assert orders.read_text() == f"-d in {folder} of all\nquit in {folder} of all\n"
    assert not Path(folder).exists() and PIPES not in os.environ and said == []


def test_runs_that_share_no_gpu_need_no_service(orders):
    for shares in (Shares(2, ("0", "1"), 1), Shares(2, (), 1), Shares(1, ("0",), 1)):
        assert use(shares) == (shares, [])
    assert not orders.exists()


@pytest.mark.parametrize("place", ["variable", "usual"])
def test_a_service_of_the_user_serves_as_it_is(orders, place, monkeypatch, tmp_path):
    if place == "variable":
        monkeypatch.setenv(PIPES, "theirs")
    else:
        (tmp_path / "no-service").mkdir()
        (tmp_path / "no-service" / "control").touch()
    assert use(SHARED) == (SHARED, [])
    assert [line.split()[0] for line in orders.read_text().splitlines()] == ["get_server_list"]
    (orders.parent / CONTROL).unlink()  # nobody to ask
    assert use(SHARED) == (SHARED, [])


def test_leftovers_of_a_dead_service_are_ignored(orders, monkeypatch):
    monkeypatch.setenv(PIPES, "theirs")
    is_dead = 'test "$order" = get_server_list && exit 1'
    (orders.parent / CONTROL).write_text(CONTROLLER.replace("exit", f"{is_dead}\nexit"))
    shares, said = use(SHARED)
    assert said == [] and shares.variables[PIPES].startswith("/tmp/kdbench-mps-")


def test_without_a_service_runs_take_turns_with_a_message(orders, monkeypatch):
    monkeypatch.setattr(mps, "PROBE", ("false",))
    shares, (said,) = use(SHARED)
    assert shares == SHARED and said == f"{TAKE_TURNS}{CONTROL} was started, and does not serve."
    assert [line.split()[0] for line in orders.read_text().splitlines()] == ["-d", "quit"]
    orders.unlink()
    (orders.parent / "code").write_text("1")
    assert use(SHARED) == (shares, [said])
    assert [line.split()[0] for line in orders.read_text().splitlines()] == ["-d"]
    monkeypatch.setattr(mps, "PROBE", ("sleep", "60"))
    monkeypatch.setattr(mps, "PATIENCE_SECONDS", 0.5)
    (orders.parent / "code").write_text("0")
    assert use(SHARED) == (shares, [said])
    monkeypatch.setenv("PATH", "/nowhere")
    shares, (said,) = use(SHARED)
    assert shares == SHARED and said.startswith(TAKE_TURNS) and "is not installed" in said


@pytest.mark.slow
def test_the_service_ends_with_a_killed_process(orders):
    program = (
        "import time; from kdbench.launch import mps; from kdbench.launch.shares import Shares\n"
        f"mps.PROBE = {mps.PROBE!r}; mps.DEFAULT_PIPES = mps.Path('no-service')\n"
        "with mps.side_by_side(Shares(2, ('0',), 1), print):\n"
        "    print('up', flush=True); time.sleep(100)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        process.kill()
    assert eventually(lambda: "quit" in orders.read_text())
    assert eventually(lambda: not Path(orders.read_text().split()[2]).exists())


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="the stand-in serves no GPU")
def test_runs_know_the_service(run_tiny, orders, monkeypatch):
    monkeypatch.setattr("kdbench.launch.shares._gpus", lambda: ("0",))
    method = write_method("knows", f"Path('knows').write_text(os.environ['{PIPES}'])")
    code, _, err = run_tiny("--methods", f"{method},baseline", "--jobs", "2")
    assert (code, err) == (0, "") and result_of("knows")["status"] == "finished"
    up, down = orders.read_text().splitlines()
    folder = Path("knows").read_text()
    assert up.startswith(f"-d in {folder} ") and down.startswith(f"quit in {folder} ")
