"""Runs that test_processes.py compares, in one or two processes; started by torchrun."""

import hashlib
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from conftest import METHODS, Completing, Stopper, Watcher
from torch import Tensor

from kdbench.data import Images, load_images, locate
from kdbench.discovery import find_methods
from kdbench.engine import run as run_module
from kdbench.engine.device import make_accelerator
from kdbench.engine.run import Run
from kdbench.engine.spec import RunSpec
from kdbench.engine.step import state_tensors
from kdbench.engine.stop import Stop, StoppedError
from kdbench.suite.load import load_suite


@contextmanager
def normalised_per_sample() -> Iterator[None]:
    """Normalize each sample by itself in this context, and compute in float64."""

    def per_sample(x, mean, var, weight, bias, *_: Any, **__: Any) -> Tensor:
        return F.group_norm(x, 1, weight, bias)

    with mock.patch.object(F, "batch_norm", per_sample):
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(torch.float32)


def leave(method: str, folder: Path, accelerator: Accelerator) -> None:
    """Leave a run after seven steps as if killed, with a checkpoint due after each step."""
    often = mock.patch.object(run_module, "SAVE_SECONDS", -1)
    with often, suppress(KeyboardInterrupt):
        _run(method, folder, accelerator, Watcher(stop_after=7)).train()


def stop_and_train(method: str, folder: Path, accelerator: Accelerator) -> dict[str, Any]:
    """Stop a run amid its second epoch by its last process, and resume it."""
    watcher = Stopper(6 if accelerator.is_last_process else None)
    try:
        _run(method, folder, accelerator, watcher, watcher.stop).train()
    except StoppedError as error:
        return train(method, folder, accelerator) | {"signal": gather_object([error.number])}
    raise AssertionError("it was not stopped")


def leave_and_train(method: str, folder: Path, accelerator: Accelerator) -> dict[str, Any]:
    """Kill a run within an epoch and resume it."""
    leave(method, folder, accelerator)
    return train(method, folder, accelerator)


def train(method: str, folder: Path, accelerator: Accelerator) -> dict[str, Any]:
    """Return learning-rate factors, epochs, test images and states of a run."""
    watcher = Watcher()
    run = _run(method, folder, accelerator, watcher)
    set_rates = run_module.set_learning_rates
    with (
        mock.patch.object(run.method, "predict", wraps=run.method.predict) as predictions,
        mock.patch.object(run_module, "set_learning_rates", wraps=set_rates) as rates,
    ):
        result = run.train()
    evaluated = [call.args[0] for call in predictions.call_args_list]
    last = torch.cat(evaluated[len(evaluated) // 2 :])  # of two evaluations
    seen = [hashlib.sha256(image.float().numpy().tobytes()).hexdigest() for image in last]
    state = hashlib.sha256()
    for tensor in state_tensors(run.method, run.optimizers):
        state.update(tensor.detach().contiguous().numpy().tobytes())
    return {
        "factors": [call.args[1] for call in rates.call_args_list],
        "steps": watcher.steps,
        "epochs": [epoch.model_dump() for epoch in result.history],
        "seen": gather_object(seen),
        "labels": run.predictions["labels"].tolist(),
        "states": gather_object([state.hexdigest()]),
    }


def _run(
    method: str, folder: Path, accelerator: Accelerator, watcher: Watcher, stop: Stop | None = None
) -> Run:
    """Build a run of two epochs of four steps, with 99 test images for uneven shares."""
    digits = load_suite("digits")
    data = digits.data.model_copy(
        update={"train": digits.data.train.model_copy(update={"per_class": 16})}
    )
    changes = {"name": "odd", "data": data, "batch_size": 40, "evaluation_batch_size": 40}
    suite = digits.model_copy(update=changes).with_epochs(2)
    source = locate(data, None)
    train, test = (load_images(source, part) for part in (data.train, data.test))
    odd = Images(test.pixels[:99], test.labels[:99])
    (entry,) = find_methods([method])
    spec = RunSpec(suite, "resnet8", entry, entry.options({}), 0)
    return Completing(spec, train, odd, folder / entry.name, accelerator, watcher, stop=stop)


def main(folder: Path) -> None:
    """Train all methods with batch normalization and without, and the resumed runs."""
    accelerator = make_accelerator(cpu=True)
    made: dict[str, Any] = {"processes": accelerator.num_processes}
    two, methods = folder / "two", [*METHODS, str(folder / "drawing.py")]
    ways = {"as it is": train, "asked to stop": stop_and_train, "killed": leave_and_train}
    for way, do in ways.items():
        made[way] = {Path(m).stem: do(m, two / way, accelerator) for m in methods}
    with normalised_per_sample():
        made["exact"] = {m: train(m, two / "exact", accelerator) for m in METHODS}
        made["resumed"] = {m: train(m, folder / "one, left", accelerator) for m in METHODS}
        for method in METHODS:
            leave(method, folder / "two, left", accelerator)
    if accelerator.is_main_process:
        (folder / "made.json").write_text(json.dumps(made))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
