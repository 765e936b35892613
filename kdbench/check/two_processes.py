"""Training of methods in two processes on the CPU. torchrun starts this file as a module."""

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

TIMEOUT_SECONDS = 120
OUTPUT_PREFIX = "kdbench-check:"


def train_in_two_processes(subjects: Sequence[Subject]) -> dict[str, str | None]:
    """Train each method in two processes under torchrun with gloo.

    Returns:
        The problem of each method, by method name, or None if there is none.
    """
    if not subjects:
        return {}
    methods = [(subject.entry.argument, subject.options.model_dump_json()) for subject in subjects]
    command = torchrun(2, __name__, json.dumps(methods))
    path = os.pathsep.join(folder for folder in sys.path if folder)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    advice = "run `kdbench run --num-processes 2` with this method to see its output"
    failure = f"the two processes timed out after {TIMEOUT_SECONDS} s; {advice}"
    output = ""
    try:
        process = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=TIMEOUT_SECONDS
        )
        output = process.stdout
        failure = f"the two processes exited with code {process.returncode}; {advice}"
    except subprocess.TimeoutExpired as error:
        output = error.stdout.decode() if isinstance(error.stdout, bytes) else ""
    problems: dict[str, str | None] = {}
    for line in output.splitlines():
        if line.startswith(OUTPUT_PREFIX):
            problems |= json.loads(line.removeprefix(OUTPUT_PREFIX))
    return {s.spec.method_name: problems.get(s.spec.method_name, failure) for s in subjects}


def main() -> None:
    """Train the methods given on the command line, as one of two processes."""
    for argument, settings in json.loads(sys.argv[1]):
        (entry,) = find_methods([argument])
        subject = Subject(entry, entry.method.Options.model_validate_json(settings))
        accelerator = make_accelerator(cpu=True)
        try:
            with subject.open_run(accelerator) as run:
                problem = _find_problem(run)
        except Exception as error:  # a method may raise anything
            problem = entry.locate_error(error).split("\n")[0]
        if accelerator.is_main_process:
            print(OUTPUT_PREFIX + json.dumps({subject.spec.method_name: problem}), flush=True)
        accelerator.wait_for_everyone()
    torch.distributed.destroy_process_group()


def _find_problem(run: Run) -> str | None:
    processes = run.accelerator.num_processes
    if processes != 2:
        return f"{processes} processes were started instead of two"
    mine = sum(len(labels) for _, labels in run.evaluation)
    shares = run.accelerator.gather(torch.tensor([mine]))
    expected = run.spec.suite.data.test.images
    if int(shares.sum()) != expected:
        return f"{int(shares.sum())} images would be evaluated instead of {expected}"
    run.train()
    for key, value in run.method.state_dict().items():
        copies = run.accelerator.gather(value.detach().reshape(1, -1))
        if not torch.equal(copies[0], copies[1]):
            return (
                f"'{key}' differs between the processes after training. Each process sees its own "
                "part of a batch, so change weights only through the losses"
            )
    return None


if __name__ == "__main__":
    main()
