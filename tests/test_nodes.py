"""Tests of two machines with separate launchers, one of which dies, and of their watchers."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from launched import PACED, RUN, eventually, free_port, result_of, status_of, write_method

pytestmark = pytest.mark.slow

LOSS = "another process is gone, or stuck for 10 minutes, says process 0 of 2"
SENTENCES = [
    "kdbench: The launcher on the machine of process 0 is gone, or that machine",
    f"kdbench: held resnet8 seed 0 failed: {LOSS}",
]
"""Message of the surviving node, by the node that dies."""
REMEDY = "; start the same command again on all machines to resume from the last checkpoint."


@contextmanager
def two_nodes(method: str, *folders: Path) -> Iterator[list[subprocess.Popen]]:
    """Start a launcher in each folder, with output in `out0`, `err0`, ..."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    launcher += ["--master-addr=localhost", f"--master-port={free_port()}"]
    nodes = []
    try:
        for rank, folder in enumerate(folders):
            node = [*launcher, f"--node-rank={rank}", *RUN, method]
            with Path(f"out{rank}").open("wb") as out, Path(f"err{rank}").open("wb") as err:
                nodes.append(subprocess.Popen(node, cwd=folder, stdout=out, stderr=err))
        yield nodes
    finally:
        for node in nodes:
            kill(node)


def messages(rank: int) -> list[str]:
    lines = Path(f"err{rank}").read_text().splitlines()
    return [line for line in lines if line.startswith("kdbench: ")]


def kill(node: subprocess.Popen) -> None:
    """Kill a launcher with its child processes, which have their own process groups."""
    if node.poll() is None:
        for process in (node, *psutil.Process(node.pid).children(recursive=True)):
            process.kill()
    node.wait(timeout=60)


SILENT = """
import os, sys, threading, time
from torch import distributed
from kdbench.launch import pulse, ranks
from kdbench.launch.place import Place

silent_after, patience = map(float, sys.argv[1:])
pulse.GIVE_SECONDS = 0.05
ranks.WATCH_SECONDS = ranks.PATIENCE_SECONDS = 0.01
store = distributed.HashStore()
other = pulse.Pulse(store, 1, 2)

def live():
    while time.monotonic() < began + silent_after:
        other.beat()
        time.sleep(0.01)

began = time.monotonic()
threading.Thread(target=live, daemon=True).start()
main = ranks.Ranks(Place(0, 2, 0, 1, launched=True), store)
main.on_failure = lambda reason: print("recorded:", reason, flush=True)
main.watch()
try:
    main.exchange("images", "mine", ranks.timedelta(seconds=patience))
except TimeoutError:
    print("it lives", flush=True)
    os._exit(0)
"""


@pytest.mark.parametrize("dies", [True, False])
def test_a_machine_that_dies_silently_is_noticed_in_any_wait(dies):
    seconds = ("0.2", "60") if dies else ("100", "4")  # four are longer than 24 looks
    command = [sys.executable, "-c", SILENT, *seconds]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=150)
    reason = "process 1, or its machine, gave no sign of life for 120 seconds"
    lost = [f"recorded: {reason}", reason.capitalize() + REMEDY]
    said = lost if dies else ["it lives"]
    assert (ended.stdout.splitlines(), ended.returncode) == (said, int(dies)), ended.stderr


ENDS = """
import contextlib, os, sys, threading
from datetime import timedelta

code, port, rank = sys.argv[1:]
os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "CUDA_VISIBLE_DEVICES": ""}
os.environ["TORCH_CPP_LOG_LEVEL"] = "ERROR"
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
with contextlib.suppress(UserError), ranks.together(None, print):
    began.wait()
    if code != "0":
        raise UserError("nothing works")
sys.exit(int(code) if threading.active_count() == 1 else "a thread is left")
"""


@pytest.mark.parametrize("code", [0, 2])
def test_watched_processes_keep_their_exit_codes(code):
    """Without a launcher, the store ends with the first process."""
    command = [sys.executable, "-c", ENDS, str(code), str(free_port())]
    processes = [
        subprocess.Popen([*command, rank], stderr=subprocess.PIPE, text=True) for rank in "01"
    ]
    said = [process.communicate(timeout=100)[1] for process in processes]
    assert [process.returncode for process in processes] == [code, code], said
    assert said == ["", ""]


@pytest.mark.parametrize("dies", [0, 1])
def test_the_remaining_processes_print_one_sentence_and_the_same_command_resumes(kdbench, dies):
    """The machines share no disk."""
    here, other = Path(), Path("other")
    other.mkdir()
    method, log = write_method("held", PACED), Path("runs/tiny/resnet8/held/seed0/log.jsonl")
    for file in ("tiny.toml", method):
        shutil.copy(file, other)
    (other / "pace").symlink_to("../pace")
    Path("pace").write_text("1")
    with two_nodes(method, here, other) as nodes:
        assert eventually((log.parent / "checkpoint-000000004.pt").exists)
        kill(nodes[dies])
        assert nodes[1 - dies].wait(timeout=100) == 1
    assert messages(1 - dies) == [SENTENCES[dies] + REMEDY]
    own, *_ = Path(f"err{1 - dies}").read_text().partition("torch/distributed/elastic")
    assert "Traceback" not in own  # what follows is the launcher's
    if dies == 1:
        assert (status_of("held").state, result_of("held")["reason"]) == ("failed", LOSS)
    first = log.read_text()
    Path("pace").write_text("0")
    with two_nodes(method, here, other) as nodes:
        assert [node.wait(timeout=100) for node in nodes] == [0, 0]
    going_on = "kdbench: held resnet8 seed 0 resumes after step 4 of 8."
    assert (messages(0), messages(1)) == ([going_on], [])
    assert Path("out0").read_text().count("tiny, resnet8") == 1
    assert Path("out1").read_text() == ""
    assert log.read_text().startswith(first)
    result = result_of("held")
    assert (result["status"], result["environment"]["processes"]) == ("finished", 2)
    assert [epoch["epoch"] for epoch in result["history"]] == [1, 2]
    assert not (other / "results").exists() and not (other / "runs").exists()
