"""Checkpoints, saved after or within an epoch, from which a run resumes exactly."""

import hashlib
import io
import operator
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, recursively_apply
from torch import Tensor
from torch.optim import Optimizer

from kdbench.atomic import atomic_write, os_errors_as_user_errors
from kdbench.engine.part import PartOfEpoch
from kdbench.method import Method

CHECKSUM_BYTES = hashlib.sha256().digest_size

FORMAT = 2
"""Version of the file's content; checkpoints of another version are rejected."""

OnRejected = Callable[[Path, str], None]
"""Called with the file of a rejected checkpoint and the reason, such as `damaged`."""


@dataclass
class Progress:
    """Progress of a run apart from its weights; plain values and tensors only."""

    epochs_done: int = 0
    part: PartOfEpoch | None = None
    """State of the epoch within which the run was stopped, if any."""
    history: str = "[]"
    """List of epochs as JSON."""
    step_seconds: Tensor = field(default_factory=lambda: torch.zeros(0), compare=False)
    """Seconds per step, one value per window; a tensor because there may be thousands."""
    place: str = ""
    """Description of the hardware that `step_seconds` were measured on."""
    places: list[tuple[str, int]] = field(default_factory=list)
    """Earlier hardware, in order, and the number of steps done when the run left it."""
    training_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    peak_memory_bytes: int = 0
    jobs: int = 1
    """Largest number of runs that shared the device; above 1, step times are not meaningful."""
    waiting_seconds: float | None = None
    """Training time spent waiting for data; None if all data is in memory."""
    undecodable: dict[str, str] = field(default_factory=dict)
    """Reasons why images could not be decoded, by image name."""


def checkpoint_key(fingerprint: str, images: str, data: str | None) -> str:
    """Return the key that a checkpoint must have for a run to resume from it.

    Args:
        fingerprint: fingerprint of the run.
        images: kind of images, such as prepared ones; empty if all images are decoded.
        data: hash of images and labels; None for results of earlier versions.
    """
    return fingerprint + images + (data or "")


def snapshot(
    fingerprint: str, method: Method, optimizers: list[Optimizer], progress: Progress
) -> dict[str, Any]:
    """Return the content of a checkpoint, copied to the CPU so that training may continue."""
    content = {
        "format": FORMAT,
        "fingerprint": fingerprint,
        "method": method.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        "progress": asdict(progress),
    }
    copied: dict[str, Any] = recursively_apply(lambda tensor: tensor.to("cpu", copy=True), content)
    return copied


def write_checkpoint(folder: Path, content: dict[str, Any], step: int) -> None:
    """Write a checkpoint and delete all others but the latest of them.

    Args:
        folder: the run's folder.
        content: what `snapshot` returned.
        step: number of steps done.

    Raises:
        UnwritableError: The checkpoint cannot be written.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    file = folder / f"checkpoint-{step:09d}.pt"
    with atomic_write(file) as stream:
        stream.write(hashlib.sha256(buffer.getbuffer()).digest())
        stream.write(buffer.getbuffer())
    # Later checkpoints belong to an earlier run with other settings, or are damaged.
    others = [other for other in _files(folder) if other != file]
    before = next((other for other in others if other < file), None)
    for other in others:
        if other != before:
            _remove(other)


def load_checkpoint(
    folder: Path,
    fingerprint: str,
    method: Method,
    optimizers: list[Optimizer],
    accelerator: Accelerator,
    on_rejected: OnRejected,
) -> Progress | None:
    """Restore a run from its latest valid checkpoint.

    The main process reads the files and sends the content to the others, which may have no access
    to its disk. Checkpoints that are damaged or belong to another version are passed to
    `on_rejected` and skipped.

    Returns:
        The restored progress, or None without a valid checkpoint of this run.
    """
    content = _read_by_main(folder, fingerprint, accelerator, on_rejected)
    if content is None:
        return None
    progress = _progress(content["progress"])
    if progress.part is not None:
        # The state that begin_epoch() resets is restored with the method's state below.
        method.begin_epoch(progress.epochs_done)
    method.load_state_dict(content["method"])
    for optimizer, state in zip(optimizers, content["optimizers"], strict=True):
        # Settings such as the learning rate come from the suite, not from the checkpoint.
        groups = optimizer.state_dict()["param_groups"]
        optimizer.load_state_dict({"state": state["state"], "param_groups": groups})
    return progress


def read_checkpoint(folder: Path, fingerprint: str) -> tuple[dict[str, Tensor], Progress] | None:
    """Return the method's state on the CPU and the progress; None without a valid checkpoint."""
    found = _last(folder, fingerprint, torch.device("cpu"))
    return None if found is None else (found[1]["method"], _progress(found[1]["progress"]))


def read_saved_steps(folder: Path, fingerprint: str) -> int:
    """Return the number of steps in the latest valid checkpoint of a run; 0 without one.

    The checkpoint may be of original or of prepared images.
    """
    found = _last(folder, fingerprint, torch.device("cpu"), matches=str.startswith)
    return 0 if found is None else int(found[0].stem.rpartition("-")[2])


def has_checkpoint(folder: Path) -> bool:
    """Return True if the folder has a checkpoint, valid or not."""
    return bool(_files(folder))


def remove_checkpoints(folder: Path) -> None:
    """Delete all checkpoints of a run.

    Raises:
        UnwritableError: A file cannot be deleted.
    """
    for file in _files(folder):
        _remove(file)


def _remove(file: Path) -> None:
    with os_errors_as_user_errors(f"remove '{file}'"):
        file.unlink(missing_ok=True)


def _read_by_main(
    folder: Path, fingerprint: str, accelerator: Accelerator, on_rejected: OnRejected
) -> dict[str, Any] | None:
    alone = accelerator.num_processes == 1
    shared: list[dict[str, Any] | None] = [None]
    if accelerator.is_main_process:
        device = accelerator.device if alone else torch.device("cpu")
        found = _last(folder, fingerprint, device, on_rejected)
        shared = [found and found[1]]
    if not alone:
        broadcast_object_list(shared)
    return shared[0]


def _last(
    folder: Path,
    fingerprint: str,
    device: torch.device,
    on_rejected: OnRejected = lambda file, why: None,
    matches: Callable[[str, str], bool] = operator.eq,
) -> tuple[Path, dict[str, Any]] | None:
    """Return the latest valid checkpoint of this run and its content."""
    for file in _files(folder):
        content = _read(file, device)
        if content is None:
            on_rejected(file, "damaged")
        elif content.get("format") == FORMAT and matches(content["fingerprint"], fingerprint):
            return file, content
        else:
            on_rejected(file, "of another version of its suite, its data, its method or kdbench")
    return None


def _read(file: Path, device: torch.device) -> dict[str, Any] | None:
    """Return the content of a file; None if it cannot be read or its checksum does not match."""
    try:
        stored = file.read_bytes()
    except OSError:
        return None
    checksum, content = stored[:CHECKSUM_BYTES], memoryview(stored)[CHECKSUM_BYTES:]
    if hashlib.sha256(content).digest() != checksum:
        return None
    loaded: dict[str, Any] = torch.load(io.BytesIO(content), map_location=device, weights_only=True)
    return loaded


def _progress(content: dict[str, Any]) -> Progress:
    """Return the progress of a checkpoint, which another version of kdbench may have written.

    Fields may differ between versions; everything that affects numbers is in the fingerprint.
    """
    known = {name: content[name] for name in Progress.__dataclass_fields__ if name in content}
    if "left" in content:  # an earlier version's name of `places`
        known |= {"places": list(content["left"].items()), "place": ""}
    part = known.pop("part", None)
    return Progress(**known, part=part and PartOfEpoch.of(part))


def _files(folder: Path) -> list[Path]:
    """Return the checkpoint files, latest first."""
    return sorted(folder.glob("checkpoint-*.pt"), reverse=True)
