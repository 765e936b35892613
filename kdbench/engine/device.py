"""Accelerate's handle on the device and the processes of a run."""

import os
import warnings
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    parse_flag_from_env,
)

from kdbench.errors import UserError

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others in an exchange; compiling and checkpoints take less."""


def trains_on_cpu() -> bool:
    """Whether there is no CUDA GPU, or Accelerate is told to leave it alone."""
    return not torch.cuda.is_available() or bool(parse_flag_from_env("ACCELERATE_USE_CPU"))


def make_accelerator(
    runs: Path | None = None,
    tensorboard: bool = False,
    cpu: bool = False,
    deterministic: bool = False,
) -> Accelerator:
    """One handle for all runs of a plan: a CUDA GPU where there is one, else the CPU.

    Deterministic, a GPU gives the same numbers each time, and an operation that cannot is an error;
    a CPU always does.

    Raises:
        UserError: TensorBoard was asked for and is not installed.
    """
    torch.set_float32_matmul_precision("high")  # fp32 means TF32 on a GPU that has it
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)  # imports the compiler
    torch.backends.cudnn.benchmark = not deterministic  # shapes never change within a run
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    # Its successor in torch 2.14 has no name in Accelerate, nor in torch before it.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    accelerator = Accelerator(
        cpu=cpu or trains_on_cpu(),  # without it, processes of a CPU train apart without an error
        kwargs_handlers=[
            # Running statistics are averaged before each evaluation instead of sent at each step.
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT),
        ],
        log_with="tensorboard" if tensorboard else None,
        project_dir=runs,
    )
    if tensorboard and not accelerator.log_with:  # it only warns when the package is absent
        raise UserError("--tensorboard needs TensorBoard: pip install 'kdbench[tensorboard]'.")
    return accelerator
