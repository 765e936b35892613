"""The Accelerator, which holds the device and the processes of a run."""

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
"""Timeout of collective operations. Compilation and checkpoints take less."""


def trains_on_cpu() -> bool:
    """Return True without a CUDA GPU, or if ACCELERATE_USE_CPU is set."""
    return not torch.cuda.is_available() or bool(parse_flag_from_env("ACCELERATE_USE_CPU"))


def emulates_bf16() -> bool:
    """Return True if training in bf16 would be slow because this CPU has no instructions for it."""
    return trains_on_cpu() and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def make_accelerator(
    runs: Path | None = None,
    tensorboard: bool = False,
    cpu: bool = False,
    deterministic: bool = False,
) -> Accelerator:
    """Create the Accelerator that all runs of a plan share, on a CUDA GPU if there is one.

    Args:
        runs: folder of the TensorBoard logs.
        tensorboard: log to TensorBoard.
        cpu: use the CPU even if there is a GPU.
        deterministic: on a GPU, use deterministic kernels only; an operation that has none raises
            an error. Results on a CPU are always deterministic.

    Raises:
        UserError: TensorBoard was requested but is not installed.
    """
    torch.set_float32_matmul_precision("high")  # fp32 means TF32 on GPUs that support it
    if deterministic != torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(deterministic)  # imports the compiler
    torch.backends.cudnn.benchmark = not deterministic  # shapes never change within a run
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS requires it
    # Neither Accelerate nor older versions of torch know the argument that replaces this one.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    accelerator = Accelerator(
        cpu=cpu or trains_on_cpu(),  # otherwise several CPU processes silently train apart
        kwargs_handlers=[
            # Running statistics are averaged before each evaluation instead of sent at each step.
            DistributedDataParallelKwargs(broadcast_buffers=False),
            InitProcessGroupKwargs(timeout=COLLECTIVE_TIMEOUT),
        ],
        log_with="tensorboard" if tensorboard else None,
        project_dir=runs,
    )
    if tensorboard and not accelerator.log_with:  # Accelerate only warns without the package
        raise UserError("--tensorboard needs TensorBoard: pip install 'kdbench[tensorboard]'.")
    return accelerator
