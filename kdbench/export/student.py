"""Loading of the network that a finished run deploys, from its last checkpoint."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from kdbench.discovery import find_methods
from kdbench.engine.checkpoint import checkpoint_key, read_checkpoint
from kdbench.engine.spec import RunSpec
from kdbench.errors import UserError
from kdbench.method_names import method_names
from kdbench.results.files import DamagedFile, read_result
from kdbench.results.schema import Epoch, Identity, Result
from kdbench.suite.suite import Suite


class DeployedNetwork(nn.Module):
    """The deployed network with its normalization.

    Takes RGB images (B, 3, H, W), float32 in [0, 1], and returns logits (B, C).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]):
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network((images - self.mean) / self.std).logits
        return logits


@dataclass(frozen=True)
class FinishedRun:
    """A finished run and the network it deploys."""

    result: Result
    results: Path
    """Folder of its result and the results of other seeds."""
    spec: RunSpec
    network: DeployedNetwork


def find_run(run: str, results: Path, runs: Path) -> tuple[Path, Path]:
    """Return the result file and the run folder of a run.

    Args:
        run: the result file, the run folder, or suite/architecture/method/seed0.
        results: folder of all results.
        runs: folder of all runs.

    Raises:
        UserError: `run` is none of these.
    """
    path = Path(run)
    given = path.resolve() if path.exists() else path
    *base, suite, architecture, method, seed = ("", "", "", "", *given.parts)
    seed = seed.removesuffix(".json")
    if not (suite and seed.removeprefix("seed").isdecimal()):
        raise UserError(
            f"'{run}' does not name a run; give a result file, a run folder, or "
            "SUITE/ARCHITECTURE/METHOD/seed0."
        )
    name = Path(suite, architecture, method)
    if given.is_file():
        results = Path(*base)
    elif given.is_dir():
        runs = Path(*base)
    return results / name / f"{seed}.json", runs / name / seed


def load_run(file: Path, folder: Path, method_file: Path | None = None) -> FinishedRun:
    """Load the deployed network of a run, in float32 and eval mode, on the CPU.

    Args:
        file: the run's result.
        folder: folder of the run's checkpoints.
        method_file: file of the method, if it neither comes with kdbench nor is installed.

    Raises:
        UserError: There is no result, the run did not finish, its checkpoint is missing or does
            not belong to the result, or the method has changed since.
    """
    result = _read_finished_result(file)
    spec = _restore_spec(result, method_file)
    method = spec.build()
    method.load_state_dict(_read_weights(result, folder))
    augmentation = spec.suite.augmentation
    network = DeployedNetwork(method.student(), augmentation.mean, augmentation.std)
    return FinishedRun(result, file.parent, spec, network)


def _read_finished_result(file: Path) -> Result:
    if not file.is_file():
        raise UserError(f"Result '{file}' does not exist; train the run with `kdbench run` first.")
    result = read_result(file)
    if isinstance(result, DamagedFile):
        raise UserError(f"'{file}' is not a valid result: {result.reason}.")
    if result.status != "finished" or result.last is None or result.cost is None:
        raise UserError(
            f"{format_label(result.identity)} has status '{result.status}'; only finished runs can "
            "be exported."
        )
    return result


def format_label(identity: Identity) -> str:
    """Return the name of a run, such as `suite/architecture/method/seed0`."""
    return f"{identity.suite}/{identity.architecture}/{identity.method}/seed{identity.seed}"


def _restore_spec(result: Result, method_file: Path | None) -> RunSpec:
    identity = result.identity
    name = identity.method.partition("@")[0]
    if method_file is None and name not in method_names():
        raise UserError(
            f"Method '{name}' neither comes with kdbench nor is installed; name its file with "
            f"--method ./{name}.py."
        )
    (entry,) = find_methods([str(method_file or name)])
    changed = UserError(
        f"'{entry.name}' or kdbench itself has changed since {format_label(identity)} was trained; "
        "train it again with --overwrite-stale."
    )
    try:
        suite = Suite.model_validate_json(json.dumps(result.protocol))
        options = entry.method.Options.model_validate_json(json.dumps(result.options))
    except ValidationError:
        raise changed from None
    spec = RunSpec(suite, identity.architecture, entry, options, identity.seed)
    if spec.fingerprint() != result.fingerprint:
        raise changed
    return spec


def _read_weights(result: Result, folder: Path) -> dict[str, Tensor]:
    """Return the weights of all networks and modules of the method."""
    run = format_label(result.identity)
    again = f"train it again: {result.environment.command} --overwrite"
    images = str(result.notes.get("images", ""))
    checkpoint = read_checkpoint(folder, checkpoint_key(result.fingerprint, images, result.data))
    if checkpoint is None:
        raise UserError(
            f"The weights of {run} were not found: '{folder}' has no valid checkpoint, and result "
            f"files never contain weights; {again}"
        )
    state, progress = checkpoint
    if [Epoch.model_validate(epoch) for epoch in json.loads(progress.history)] != result.history:
        raise UserError(
            f"The checkpoint in '{folder}' belongs to another training than the result of {run}; "
            f"{again}"
        )
    return state
