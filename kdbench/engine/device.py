"""Accelerate's handle on the device and the processes of a run."""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs

from kdbench.errors import UserError


def make_accelerator(
    runs: Path | None = None, tensorboard: bool = False, cpu: bool = False
) -> Accelerator:
    """One handle for all runs of a plan: a CUDA GPU where there is one, else the CPU.

    Raises:
        UserError: TensorBoard was asked for and is not installed.
    """
    torch.set_float32_matmul_precision("high")  # fp32 means TF32 on a GPU that has it
    torch.backends.cudnn.benchmark = True  # shapes never change within a run
    accelerator = Accelerator(
        cpu=cpu or not torch.cuda.is_available(),
        # Running statistics are averaged before each evaluation instead of sent at each step.
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False)],
        log_with="tensorboard" if tensorboard else None,
        project_dir=runs,
    )
    if tensorboard and not accelerator.log_with:  # it only warns when the package is absent
        raise UserError("--tensorboard needs TensorBoard: pip install 'kdbench[tensorboard]'.")
    return accelerator
