"""Which of the ways to run a training step repays itself."""

from functools import cache
from typing import Literal

import torch

from kdbench.backbones import build
from kdbench.engine.measure import forward_flops
from kdbench.engine.step import Mode
from kdbench.errors import UserError
from kdbench.suite.suite import Suite

Compile = Literal["auto", "off"] | Mode

REPAID_PER_THREAD = 3e14
"""Training FLOPs per CPU thread from which on compiling for a minute or two saves more time."""

REPAID_ON_GPU = 3e15


def step_mode(
    asked: Compile, suite: Suite, architecture: str, device: torch.device, processes: int = 1
) -> Mode:
    """How the steps of all methods under a suite run.

    `auto` depends on the schedule, not on how much of it is left nor on the method: so a resumed
    run goes on as it began, and the rates of a table compare like with like.

    Raises:
        UserError: a CUDA graph was asked for where none can be recorded.
    """
    graphs = device.type == "cuda" and processes == 1
    if asked == "off":
        return "eager"
    if asked == "auto":
        long = rough_flops(suite, architecture) >= _repaid(device)
        if graphs:
            return "inductor+graph" if long else "graph"
        return "inductor" if long else "eager"
    if "graph" in asked and not graphs:
        why = "a CUDA GPU" if device.type != "cuda" else "a run in one process"
        raise UserError(f"--compile {asked} needs {why}; 'auto' takes what there is.")
    return asked


def rough_flops(suite: Suite, architecture: str) -> float:
    """Of a whole run of the suite's number of networks; a backward pass counts as two forward."""
    named = architecture.split("+")
    shape = suite.data.classes, suite.data.image_size
    forward = sum(_network_flops(name, *shape) for name in named) / len(named)
    return 3 * forward * suite.networks * suite.batch_size * suite.total_steps


@cache
def _network_flops(name: str, classes: int, image_size: int) -> int:
    """Asked for by every run of a plan."""
    return forward_flops(build(name, classes), image_size)


def _repaid(device: torch.device) -> float:
    if device.type == "cuda":
        return REPAID_ON_GPU
    return REPAID_PER_THREAD * torch.get_num_threads()
