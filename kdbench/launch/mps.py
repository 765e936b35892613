"""Runs that share a GPU use it at the same time where NVIDIA's MPS is installed, else in turn."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from kdbench.atomic import exists
from kdbench.launch.shares import VISIBLE, Shares

CONTROL = "nvidia-cuda-mps-control"
PIPES = "CUDA_MPS_PIPE_DIRECTORY"
LOGS = "CUDA_MPS_LOG_DIRECTORY"

DEFAULT_PIPES = Path("/tmp/nvidia-mps")

SERVICE = f'{CONTROL} -d >&2 && echo up && cat && echo quit | {CONTROL}; rm -rf "${PIPES}"'
"""Ends once its input does: also where this process is killed."""

ASK = f"echo get_server_list | {CONTROL}"
"""Fails where no service is up."""

PROBE = (sys.executable, "-c", "import torch; torch.zeros(1, device='cuda')")

PATIENCE_SECONDS = 60.0


@contextlib.contextmanager
def side_by_side(shares: Shares, say: Callable[[str], None]) -> Iterator[Shares]:
    """The shares with what lets runs use one GPU at the same time; inside, the service is up.

    A service that the user started serves them as it is. Where none can be had, `say` is told.
    """
    if not shares.gpus or shares.on_a_device == 1 or _is_up():
        yield shares
        return
    if shutil.which(CONTROL) is None:
        say(_in_turn(f"{CONTROL}, which lets them use it at the same time, is not installed"))
        yield shares
        return
    # The path of a socket may not be long, and TMPDIR is on some clusters.
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(
            tempfile.TemporaryDirectory(
                prefix="kdbench-mps-", dir="/tmp", ignore_cleanup_errors=True
            )
        )
        own = {PIPES: folder, LOGS: folder}
        if stack.enter_context(_service(own)):
            yield replace(shares, variables=own)
            return
    say(_in_turn(f"{CONTROL} was started, and does not serve"))
    yield shares


def _is_up() -> bool:
    """Whether there is a service of the user's; what a dead one left is none."""
    if PIPES not in os.environ and not exists(DEFAULT_PIPES / "control"):
        return False
    if shutil.which(CONTROL) is None:  # in a container, say: nobody to ask
        return True
    return _succeeds(("/bin/sh", "-c", ASK), {})


def _in_turn(why: str) -> str:
    return f"The runs of a GPU take turns on it: {why}."


@contextlib.contextmanager
def _service(own: dict[str, str]) -> Iterator[bool]:
    """Whether a process can use the GPU through it."""
    # GPUs are numbered as the runs know them, whichever this process was given.
    everything = {name: value for name, value in os.environ.items() if name != VISIBLE}
    service = subprocess.Popen(
        ["/bin/sh", "-c", SERVICE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=everything | own,
        process_group=0,  # a terminal sends Ctrl-C to this process alone
    )
    assert service.stdin is not None and service.stdout is not None
    try:
        yield service.stdout.readline() == b"up\n" and _succeeds(PROBE, own)
    finally:
        service.stdin.close()
        try:
            service.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(service.pid, signal.SIGKILL)
            service.wait()
        service.stdout.close()


def _succeeds(command: Sequence[str], own: dict[str, str]) -> bool:
    """Whether it ends well, and in time."""
    try:
        ended = subprocess.run(
            command,
            env=os.environ | own,
            capture_output=True,
            timeout=PATIENCE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return False
    return ended.returncode == 0
