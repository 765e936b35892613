"""Tests of two machines with separate launchers, one of which dies."""

import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
from launched import PACED, eventually, free_port, result_of, status_of, write_method

pytestmark = pytest.mark.slow

LOSS = "another process is gone, or stuck for 10 minutes, says process 0 of 2"
RESUME_HINT = "start the same command again on all machines to resume from the last checkpoint."
SENTENCES = [
    f"kdbench: The launcher on the machine of process 0 is gone, or that machine; {RESUME_HINT}",
    f"kdbench: held resnet8 seed 0 failed: {LOSS}; {RESUME_HINT}",
]
"""Message of the surviving node, by the node that dies."""


@contextmanager
def two_nodes(method: str) -> Iterator[list[subprocess.Popen]]:
    """Start the launchers, with output in `node0` and `node1`."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    launcher += ["--master-addr=localhost", f"--master-port={free_port()}"]
    command = ["-m", "kdbench", "run", "--suite", "tiny.toml", "--methods", method]
    nodes = []
    try:
        for rank in (0, 1):
            with Path(f"node{rank}").open("wb") as log:
                node = [*launcher, f"--node-rank={rank}", *command]
                nodes.append(subprocess.Popen(node, stdout=log, stderr=log))
        yield nodes
    finally:
        for node in nodes:
            kill(node)


def kill(node: subprocess.Popen) -> None:
    """Kill a launcher with its child processes, which have their own process groups."""
    if node.poll() is None:
        processes = psutil.Process(node.pid).children(recursive=True)
        for process in (node, *processes):
            process.send_signal(signal.SIGKILL)
    node.wait(timeout=60)


SILENT = """
import os, sys, threading, time
from torch import distributed
from kdbench.launch import pulse, ranks
from kdbench.launch.place import Place

silent_after = float(sys.argv[1])
pulse.GIVE_SECONDS = 0.05
ranks.WATCH_SECONDS = ranks.PATIENCE_SECONDS = 0.01
store = distributed.HashStore()
other = pulse.Pulse(store, 1, 2)

def live():
    while time.monotonic() < began + silent_after and not over.wait(0.01):
        other.beat()

began, over = time.monotonic(), threading.Event()
living = threading.Thread(target=live, daemon=True)
living.start()
main = ranks.Ranks(Place(0, 2, 0, 1, launched=True), store)
main.on_failure = lambda reason: print("recorded:", reason, flush=True)
main.watch()
try:
    patience = 60 if silent_after < 60 else 4  # longer than 24 looks
    main.exchange("images", "mine", ranks.timedelta(seconds=patience))
except TimeoutError:
    print("it lives")
    over.set()
    living.join()
    main.unwatch()
"""


@pytest.mark.parametrize(("after", "lost"), [(0.2, True), (100, False)])
def test_a_machine_that_dies_silently_is_noticed_in_any_wait(after, lost):
    ended = subprocess.run(
        [sys.executable, "-c", SILENT, str(after)], capture_output=True, text=True, timeout=150
    )
    reason = "process 1, or its machine, gave no sign of life for 120 seconds"
    lines = [f"recorded: {reason}", f"{reason.capitalize()}; {RESUME_HINT}"]
    said = lines if lost else ["it lives"]
    assert (ended.stdout.splitlines(), ended.returncode) == (said, int(lost)), ended.stderr


@pytest.mark.parametrize("dies", [0, 1])
def test_the_remaining_processes_print_one_sentence_and_the_same_command_resumes(kdbench, dies):
    method, log = write_method("held", PACED), Path("runs/tiny/resnet8/held/seed0/log.jsonl")
    Path("pace").write_text("1")
    with two_nodes(method) as nodes:
        assert eventually((log.parent / "checkpoint-000000004.pt").exists)
        kill(nodes[dies])
        assert nodes[1 - dies].wait(timeout=100) == 1
    said = Path(f"node{1 - dies}").read_text()
    own, *_ = said.partition("torch/distributed/elastic")  # from here on it is the launcher's
    assert [line for line in said.splitlines() if line.startswith("kdbench: ")] == [SENTENCES[dies]]
    assert "Traceback" not in own
    if dies == 1:
        assert (status_of("held").state, result_of("held")["reason"]) == ("failed", LOSS)
    first = log.read_text()
    Path("pace").write_text("0")
    with two_nodes(method) as nodes:
        assert [node.wait(timeout=100) for node in nodes] == [0, 0]
    assert log.read_text().startswith(first) and result_of("held")["status"] == "finished"
