"""Runs that test_processes.py compares, in one process or in each of two; torchrun starts this."""

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from conftest import METHODS, Watcher
from torch import Tensor

from kdbench.data import Images, load_images, locate
from kdbench.discovery import find_methods
from kdbench.engine import run as run_module
from kdbench.engine.device import make_accelerator
from kdbench.engine.run import Run
from kdbench.engine.spec import RunSpec
from kdbench.engine.step import state_tensors
from kdbench.suite import Suite, load_suite


def odd_suite() -> Suite:
    """Two epochs of four steps; 99 test images, which two processes cannot share evenly."""
    digits = load_suite("digits")
    train = digits.data.train.model_copy(update={"per_class": 16})
    data = digits.data.model_copy(update={"train": train})
    changes = {"name": "odd", "data": data, "batch_size": 40, "evaluation_batch_size": 40}
    return digits.model_copy(update=changes).with_epochs(2)


def odd_images(suite: Suite) -> tuple[Images, Images]:
    source = locate(suite.data, None)
    train, test = (load_images(source, part) for part in (suite.data.train, suite.data.test))
    return train, Images(test.pixels[:99], test.labels[:99])


@contextmanager
def normalised_per_sample() -> Iterator[None]:
    """No image's output depends on others of its batch, and numbers are float64."""

    def per_sample(x, mean, var, weight, bias, *_: Any, **__: Any) -> Tensor:
        return F.group_norm(x, 1, weight, bias)

    original, F.batch_norm = F.batch_norm, per_sample
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)
        F.batch_norm = original


class Stopped(Exception):  # noqa: N818
    """The run ends here, as if it were killed."""


class Stops(Watcher):
    """Stops a run after its first epoch."""

    def on_epoch(self, epoch, resumed) -> None:
        raise Stopped


def stop(method: str, folder: Path, accelerator: Accelerator) -> None:
    """Leave the checkpoint of one epoch."""
    with suppress(Stopped):
        _run(method, folder, accelerator, Stops()).train()


def train(method: str, folder: Path, accelerator: Accelerator) -> dict[str, Any]:
    """What the run came to: factors of the rates, epochs, test images seen, states by process."""
    factors: list[float] = []
    seen: list[str] = []
    watcher = Watcher()
    run = _run(method, folder, accelerator, watcher)
    predict, set_rates = run.method.predict, run_module.set_learning_rates

    def watched_predict(images: Tensor) -> dict[str, Tensor]:
        if run.progress.epochs_done == 1:
            seen.extend(hashlib.sha256(i.float().numpy().tobytes()).hexdigest() for i in images)
        return predict(images)

    def watched_rates(optimizers: Any, factor: float) -> None:
        factors.append(factor)
        set_rates(optimizers, factor)

    run.method.predict = watched_predict
    run_module.set_learning_rates = watched_rates
    try:
        result = run.train()
    finally:
        run_module.set_learning_rates = set_rates
    state = hashlib.sha256()
    for tensor in state_tensors(run.method, run.optimizers):
        state.update(tensor.detach().contiguous().numpy().tobytes())
    return {
        "factors": factors,
        "steps": watcher.steps,
        "epochs": [epoch.model_dump() for epoch in result.history],
        "seen": gather_object(seen),
        "states": gather_object([state.hexdigest()]),
    }


def _run(method: str, folder: Path, accelerator: Accelerator, watcher: Watcher) -> Run:
    suite = odd_suite()
    (entry,) = find_methods([method])
    spec = RunSpec(suite, "resnet8", entry, entry.options({}), 0)
    return Run(spec, *odd_images(suite), folder / method, accelerator, watcher)


def main(folder: Path) -> None:
    """In each process: all methods with batch normalisation and without, then what is resumed."""
    accelerator = make_accelerator(cpu=True)
    made: dict[str, Any] = {"processes": accelerator.num_processes}
    made["as it is"] = {m: train(m, folder / "two" / "as it is", accelerator) for m in METHODS}
    with normalised_per_sample():
        made["exact"] = {m: train(m, folder / "two" / "exact", accelerator) for m in METHODS}
        made["resumed"] = {m: train(m, folder / "one, stopped", accelerator) for m in METHODS}
        for method in METHODS:
            stop(method, folder / "two, stopped", accelerator)
    if accelerator.is_main_process:
        (folder / "made.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
