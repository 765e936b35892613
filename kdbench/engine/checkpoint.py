"""Checkpoints, after an epoch or in its midst: all it takes to go on as if nothing had happened."""

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
"""Of what is in the file: one of another format is not gone on from."""

Refused = Callable[[Path, str], None]
"""Told which checkpoint is not gone on from, and what it is, such as `damaged`."""


@dataclass
class Progress:
    """What a run has done so far, besides its weights; plain values and tensors only."""

    epochs_done: int = 0
    part: PartOfEpoch | None = None
    """Of the epoch after those, where the run was stopped in its midst."""
    history: str = "[]"
    """JSON list of epochs."""
    step_seconds: Tensor = field(default_factory=lambda: torch.zeros(0), compare=False)
    """As they were measured, a value a window; thousands, which are copied as one."""
    place: str = ""
    """What they were measured on, and how: others have no common median."""
    places: list[tuple[str, int]] = field(default_factory=list)
    """Those before, in their order, and the steps done in the end there."""
    training_seconds: float = 0.0
    evaluation_seconds: float = 0.0
    peak_memory_bytes: int = 0
    jobs: int = 1
    """Most runs that ever shared the device: windows timed among several are no measure."""
    waiting_seconds: float | None = None
    """Of training, for data; None where there is nothing to wait for."""
    undecodable: dict[str, str] = field(default_factory=dict)
    """Images that could not be decoded: reasons by name."""


def snapshot(
    fingerprint: str, method: Method, optimizers: list[Optimizer], progress: Progress
) -> dict[str, Any]:
    """What a checkpoint holds now, on the CPU: training may go on while it is written."""
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
    """Write the checkpoint after so many steps; of those before, the last is kept too.

    Raises:
        UnwritableError: the folder or the disk does not take it.
    """
    buffer = io.BytesIO()
    torch.save(content, buffer)
    file = folder / f"checkpoint-{step:09d}.pt"
    with atomic_write(file) as stream:
        stream.write(hashlib.sha256(buffer.getbuffer()).digest())
        stream.write(buffer.getbuffer())
    # Later ones are of a run before that went another way, or damaged.
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
    on_refused: Refused,
) -> Progress | None:
    """Restore the run's state; None where there is no checkpoint of this very run.

    The main process reads the files and hands the last whole one to the others, who may lie on
    other disks. One that is damaged or of another run is told, and the one before it counts.
    """
    content = _read_by_main(folder, fingerprint, accelerator, on_refused)
    if content is None:
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
    found = _last(folder, fingerprint, torch.device("cpu"))
    return None if found is None else (found[1]["method"], _progress(found[1]["progress"]))


def steps_saved(folder: Path, fingerprint: str) -> int:
    """Those in the last whole checkpoint of this run, whatever its images were read from."""
    found = _last(folder, fingerprint, torch.device("cpu"), alike=str.startswith)
    return 0 if found is None else int(found[0].stem.rpartition("-")[2])


def has_checkpoint(folder: Path) -> bool:
    """Whether there is one, of whatever run."""
    return bool(_files(folder))


def remove_checkpoints(folder: Path) -> None:
    """Forget what a run did so far.

    Raises:
        UnwritableError: one cannot be removed.
    """
    for file in _files(folder):
        _remove(file)


def _remove(file: Path) -> None:
    with os_errors_as_user_errors(f"remove '{file}'"):
        file.unlink(missing_ok=True)


def _read_by_main(
    folder: Path, fingerprint: str, accelerator: Accelerator, on_refused: Refused
) -> dict[str, Any] | None:
    alone = accelerator.num_processes == 1
    shared: list[dict[str, Any] | None] = [None]
    if accelerator.is_main_process:
        device = accelerator.device if alone else torch.device("cpu")
        found = _last(folder, fingerprint, device, on_refused)
        shared = [found and found[1]]
    if not alone:
        broadcast_object_list(shared)
    return shared[0]


def _last(
    folder: Path,
    fingerprint: str,
    device: torch.device,
    on_refused: Refused = lambda file, why: None,
    alike: Callable[[str, str], bool] = operator.eq,
) -> tuple[Path, dict[str, Any]] | None:
    """The last whole one of this very run, and what is in it."""
    for file in _files(folder):
        content = _read(file, device)
        if content is None:
            on_refused(file, "damaged")
        elif content.get("format") == FORMAT and alike(content["fingerprint"], fingerprint):
            return file, content
        else:
            on_refused(file, "of another version of its suite, its method or kdbench")
    return None


def _read(file: Path, device: torch.device) -> dict[str, Any] | None:
    """None where it is not what was written, or cannot be read."""
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
    """Another version may have noted more or less; what moves numbers is in the fingerprint."""
    known = {name: content[name] for name in Progress.__dataclass_fields__ if name in content}
    if "left" in content:  # of a version that called places by other names
        known |= {"places": list(content["left"].items()), "place": ""}
    part = known.pop("part", None)
    return Progress(**known, part=part and PartOfEpoch.of(part))


def _files(folder: Path) -> list[Path]:
    """The last first."""
    return sorted(folder.glob("checkpoint-*.pt"), reverse=True)
