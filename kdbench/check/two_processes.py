"""Methods in two processes on the CPU; torchrun starts this file as a module."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence

import torch

from kdbench.check.subject import Subject
from kdbench.discovery import find_methods
from kdbench.engine.device import make_accelerator
from kdbench.engine.run import Run
from kdbench.launch.torchrun import torchrun

TIMEOUT = 120
MARK = "kdbench-check:"


def train_in_two_processes(subjects: Sequence[Subject]) -> dict[str, str | None]:
    """Train each under torchrun with gloo; by method None if all is well, else what is not."""
    if not subjects:
        return {}
    asked = [(subject.entry.argument, subject.options.model_dump_json()) for subject in subjects]
    command = torchrun(2, __name__, json.dumps(asked))
    path = os.pathsep.join(folder for folder in sys.path if folder)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    failure = f"two processes did not end in {TIMEOUT} s"
    output = ""
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT
        )
        output, failure = done.stdout, f"two processes ended with code {done.returncode}"
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else ""
    said: dict[str, str | None] = {}
    for line in output.splitlines():
        if line.startswith(MARK):
            said |= json.loads(line.removeprefix(MARK))
    return {s.spec.method_name: said.get(s.spec.method_name, failure) for s in subjects}


def main() -> None:
    """What each of the two processes does."""
    for argument, settings in json.loads(sys.argv[1]):
        (entry,) = find_methods([argument])
        subject = Subject(entry, entry.method.Options.model_validate_json(settings))
        accelerator = make_accelerator(cpu=True)
        try:
            with subject.run(accelerator) as run:
                complaint = _complaint(run)
        except Exception as error:  # a method may raise anything
            complaint = entry.blame(error).split("\n")[0]
        if accelerator.is_main_process:
            print(MARK + json.dumps({subject.spec.method_name: complaint}), flush=True)
        accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


def _complaint(run: Run) -> str | None:
    processes = run.accelerator.num_processes
    if processes != 2:
        return f"{processes} processes were started, not two"
    mine = sum(len(labels) for _, labels in run.evaluation)
    shares = run.accelerator.gather(torch.tensor([mine]))
    expected = run.spec.suite.data.test.images
    if int(shares.sum()) != expected:
        return f"{int(shares.sum())} images would be evaluated, not {expected}"
    run.train()
    for key, value in run.method.state_dict().items():
        copies = run.accelerator.gather(value.detach().reshape(1, -1))
        if not torch.equal(copies[0], copies[1]):
            return f"'{key}' differs between the processes"
    return None


if __name__ == "__main__":
    main()
