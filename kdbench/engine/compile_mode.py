"""Choice between eager, compiled and CUDA-graph training steps."""

from functools import cache
from typing import Literal

import torch

from kdbench.backbones import build
from kdbench.engine.measure import forward_flops
from kdbench.engine.step import Mode
from kdbench.errors import UserError
from kdbench.suite.suite import Suite

Compile = Literal["auto", "off"] | Mode

MIN_FLOPS_PER_CPU_THREAD = 3e14
"""Training FLOPs per CPU thread above which compilation saves more time than it takes."""

MIN_FLOPS_ON_GPU = 3e15
"""Training FLOPs above which compilation saves more time than it takes on a GPU."""


def resolve_compile_mode(
    requested: Compile, suite: Suite, architecture: str, device: torch.device, processes: int = 1
) -> Mode:
    """Return how training steps run, the same for all methods under a suite.

    `auto` depends on the length of the schedule, but not on the method or on the epochs already
    done. A resumed run therefore keeps its mode, and all rows of a table are run alike.

    Raises:
        UserError: A CUDA graph was requested where none can be recorded.
    """
    graphs = device.type == "cuda" and processes == 1
    if requested == "off":
        return "eager"
    if requested == "auto":
        long = estimate_run_flops(suite, architecture) >= _min_flops_to_compile(device)
        if graphs:
            return "inductor+graph" if long else "graph"
        return "inductor" if long else "eager"
    if "graph" in requested and not graphs:
        requirement = "a CUDA GPU" if device.type != "cuda" else "a run in one process"
        raise UserError(
            f"--compile {requested} needs {requirement}; --compile auto chooses what is possible."
        )
    return requested


def estimate_run_flops(suite: Suite, architecture: str) -> float:
    """Estimate the training FLOPs of a run with the suite's number of networks.

    A backward pass counts as two forward passes.
    """
    names = architecture.split("+")
    shape = suite.data.classes, suite.data.image_size
    forward = sum(_network_flops(name, *shape) for name in names) / len(names)
    return 3 * forward * suite.networks * suite.batch_size * suite.total_steps


@cache
def _network_flops(name: str, classes: int, image_size: int) -> int:
    return forward_flops(build(name, classes), image_size)


def _min_flops_to_compile(device: torch.device) -> float:
    if device.type == "cuda":
        return MIN_FLOPS_ON_GPU
    return MIN_FLOPS_PER_CPU_THREAD * torch.get_num_threads()
