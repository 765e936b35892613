"""The network that a finished run deploys, from the checkpoint of its last epoch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from kdbench.discovery import find_methods
from kdbench.engine.checkpoint import read_checkpoint
from kdbench.engine.spec import RunSpec
from kdbench.errors import UserError
from kdbench.method_names import method_names
from kdbench.results.files import DamagedFile, read_result
from kdbench.results.schema import Epoch, Identity, Result
from kdbench.suite.suite import Suite


class Deployed(nn.Module):
    """What ships: images (B, 3, H, W), RGB, float32 in [0, 1] -> logits (B, C).

    Normalisation is part of it.
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
class Finished:
    """A run that came to its end."""

    result: Result
    results: Path
    """Folder of its result and those of other seeds."""
    spec: RunSpec
    network: Deployed


def find(run: str, results: Path, runs: Path) -> tuple[Path, Path]:
    """Result file and folder of a run: named by either, or as suite/architecture/method/seed0.

    Raises:
        UserError: it is none of these.
    """
    path = Path(run)
    given = path.resolve() if path.exists() else path
    *base, suite, architecture, method, seed = ("", "", "", "", *given.parts)
    seed = seed.removesuffix(".json")
    if not (suite and seed.removeprefix("seed").isdecimal()):
        raise UserError(
            f"'{run}' is no run; name its result file, its folder among the runs, or "
            "SUITE/ARCHITECTURE/METHOD/seed0."
        )
    name = Path(suite, architecture, method)
    if given.is_file():
        results = Path(*base)
    elif given.is_dir():
        runs = Path(*base)
    return results / name / f"{seed}.json", runs / name / seed


def load(file: Path, folder: Path, method_file: Path | None = None) -> Finished:
    """The deployed network of a run, float32, in evaluation mode, on the CPU.

    Args:
        file: its result.
        folder: where its checkpoint is.
        method_file: holds its method, where that neither ships nor is installed.

    Raises:
        UserError: there is no result, the run did not finish, its weights are not here
            or another training's, or its method is another by now.
    """
    result = _finished(file)
    spec = _spec(result, method_file)
    method = spec.build()
    method.load_state_dict(_weights(result, folder))
    augmentation = spec.suite.augmentation
    network = Deployed(method.student(), augmentation.mean, augmentation.std)
    return Finished(result, file.parent, spec, network)


def _finished(file: Path) -> Result:
    if not file.is_file():
        raise UserError(f"There is no result '{file}'; `kdbench run` makes it.")
    result = read_result(file)
    if isinstance(result, DamagedFile):
        raise UserError(f"'{file}' is no valid result: {result.reason}.")
    if result.status != "finished" or result.last is None or result.cost is None:
        raise UserError(f"{label(result.identity)} {result.status}: it deploys no network.")
    return result


def label(identity: Identity) -> str:
    """`suite/architecture/method/seed0`."""
    return f"{identity.suite}/{identity.architecture}/{identity.method}/seed{identity.seed}"


def _spec(result: Result, method_file: Path | None) -> RunSpec:
    identity = result.identity
    name = identity.method.partition("@")[0]
    if method_file is None and name not in method_names():
        raise UserError(
            f"Method '{name}' neither ships nor is installed; --method ./{name}.py names its file."
        )
    (entry,) = find_methods([str(method_file or name)])
    changed = UserError(
        f"'{entry.name}', or kdbench itself, is another than the one that trained "
        f"{label(identity)}; run it again with --overwrite-stale."
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


def _weights(result: Result, folder: Path) -> dict[str, Tensor]:
    """Of all networks and modules of the method."""
    run, again = label(result.identity), f"train it again: {result.environment.command} --overwrite"
    found = read_checkpoint(folder, result.fingerprint + str(result.notes.get("images", "")))
    if found is None:
        raise UserError(
            f"The weights of {run} are not here: results come without, and '{folder}' holds no "
            f"whole checkpoint of it; {again}"
        )
    state, progress = found
    if [Epoch.model_validate(epoch) for epoch in json.loads(progress.history)] != result.history:
        raise UserError(
            f"The checkpoint in '{folder}' is not of the training that the result of {run} tells "
            f"of; {again}"
        )
    return state
