"""Checkpoints, after an epoch or in its midst: all it takes to go on as if nothing had happened."""

import pickle
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.optim import Optimizer

from kdbench.atomic import written_whole
from kdbench.method import Method


class DamagedCheckpointError(Exception):
    """A checkpoint that cannot be read."""


@dataclass
class PartOfEpoch:
    """Where an epoch was left."""

    steps: int
    """Done; all of them where it was left during its evaluation."""
    loss_sums: dict[str, float] = field(default_factory=dict)
    """Each term, summed over those steps."""
    noise: tuple[Tensor, ...] = ()
    """Where torch's generators were."""


@dataclass
class Progress:
    """What a run has done so far, besides its weights; plain values and tensors only."""

    epochs_done: int = 0
    part: PartOfEpoch | None = None
    """Of the epoch after those, where the run was stopped in its midst."""
    history: str = "[]"
    """JSON list of epochs."""
    windows: tuple[float, ...] = ()
    """Seconds per step that were measured."""
    device: str = ""
    """Where they were measured: rates of two devices have no common median."""
    training_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    peak_memory_bytes: int = 0
    jobs: int = 1
    """Most runs that ever shared the device: windows timed among several are no measure."""
    waiting_seconds: float | None = None
    """Of training, for data; None where there is nothing to wait for."""
    undecodable: dict[str, str] = field(default_factory=dict)
    """Images that could not be decoded: reasons by name."""


def save_checkpoint(
    folder: Path, fingerprint: str, method: Method, optimizers: list[Optimizer], progress: Progress
) -> None:
    """Replace the checkpoint in one step; a kill leaves the old one or the new one.

    Raises:
        UserError: the folder cannot be written.
    """
    content = {
        "fingerprint": fingerprint,
        "method": method.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "progress": asdict(progress),
    }
    with written_whole(_file(folder)) as stream:
        torch.save(content, stream)


def load_checkpoint(
    folder: Path,
    fingerprint: str,
    method: Method,
    optimizers: list[Optimizer],
    accelerator: Accelerator,
) -> Progress | None:
    """Restore the run's state; None where there is no checkpoint of this very run.

    The main process reads the file and hands it to the others, who may lie on other disks.

    Raises:
        DamagedCheckpointError: there is a file, and it cannot be read; the others get None.
    """
    content = _read_by_main(folder, accelerator)
    if content is None or content["fingerprint"] != fingerprint:
        return None
    progress = _progress(content["progress"])
    if progress.part is not None:
        # What the method resets at the start of an epoch comes back with its state.
        method.begin_epoch(progress.epochs_done)
    method.load_state_dict(content["method"])
    for optimizer, state in zip(optimizers, content["optimizers"], strict=True):
        # Rates and the like are the suite's, held as this way of running steps needs them.
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    return progress


def read_checkpoint(folder: Path, fingerprint: str) -> tuple[dict[str, Tensor], Progress] | None:
    """The method's state, on the CPU, and progress; None without a whole checkpoint of this run."""
    try:
        content = _read(folder, torch.device("cpu"))
    except DamagedCheckpointError:
        return None
    if content is None or content["fingerprint"] != fingerprint:
        return None
    return content["method"], _progress(content["progress"])


def has_checkpoint(folder: Path) -> bool:
    """Whether there is one, of whatever run."""
    return _file(folder).exists()


def remove_checkpoint(folder: Path) -> None:
    """Forget what a run did so far."""
    _file(folder).unlink(missing_ok=True)


def _read_by_main(folder: Path, accelerator: Accelerator) -> dict[str, Any] | None:
    if accelerator.num_processes == 1:
        return _read(folder, accelerator.device)
    shared: list[dict[str, Any] | None] = [None]
    damaged: DamagedCheckpointError | None = None
    if accelerator.is_main_process:
        try:
            shared = [_read(folder, torch.device("cpu"))]
        except DamagedCheckpointError as error:
            damaged = error
    broadcast_object_list(shared)
    if damaged is not None:
        raise damaged
    return shared[0]


def _read(folder: Path, device: torch.device) -> dict[str, Any] | None:
    file = _file(folder)
    if not file.is_file():
        return None
    try:
        content: dict[str, Any] = torch.load(file, map_location=device, weights_only=True)
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError) as error:
        raise DamagedCheckpointError(f"its checkpoint {file} is damaged") from error
    return content


def _progress(content: dict[str, Any]) -> Progress:
    part = content.pop("part", None)
    return Progress(**content, part=part and PartOfEpoch(**part))


def _file(folder: Path) -> Path:
    return folder / "checkpoint.pt"
