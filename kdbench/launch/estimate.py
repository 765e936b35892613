"""How long a plan will take: from results made on this device, else from steps timed now."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch

from kdbench.data import batch_share
from kdbench.engine.environment import device_name
from kdbench.engine.measure import forward_flops, synchronized_time
from kdbench.engine.optimizers import build_optimizers
from kdbench.engine.spec import RunSpec
from kdbench.engine.step import Mode, TrainingStep
from kdbench.errors import UserError
from kdbench.launch.plan import PlannedRun
from kdbench.results.files import iter_results
from kdbench.results.schema import Result

TIMED_STEPS = 2

TIMED_FLOPS = 5e10
"""Of a timed forward pass on a CPU, whose time is in proportion to the batch: 256 large images
would take minutes and gigabytes. On a GPU the whole batch is timed."""


Key = tuple[str, str, str, int, int, str]
"""What the time of a step depends on."""


def estimate_seconds(
    plan: list[PlannedRun],
    done: Sequence[int],
    results: Path,
    device: torch.device,
    modes: Sequence[Mode],
    processes: int = 1,
) -> list[float]:
    """Seconds of training left for each run of the plan, of which so many steps are `done`; 0 where
    its result exists.

    Taken from results whose steps ran in the same way (`modes`, by run). What no result tells is
    timed in steps that run eagerly, without what several processes exchange: nobody waits for a
    compiler or for others to see a plan.
    """
    known = _measured(results, device, processes)
    seconds = []
    for run, steps, mode in zip(plan, done, modes, strict=True):
        key = _key(run.spec, mode)
        if run.state == "to run" and key not in known:
            try:
                known[key] = _time_step(run.spec, device, processes)
            except Exception as error:  # a method may raise anything, and would in the run
                what = run.spec.entry.locate_error(error).split("\n")[0]
                raise UserError(f"Method '{run.spec.entry.name}' fails: {what}.") from error
        remaining = run.spec.suite.total_steps - steps if run.state == "to run" else 0
        seconds.append(remaining * known.get(key, 0.0))
    return seconds


def _key(spec: RunSpec, mode: Mode) -> Key:
    suite = spec.suite
    shape = suite.batch_size, suite.data.image_size
    return spec.method_name, spec.architecture, suite.precision, *shape, mode


def _measured(results: Path, device: torch.device, processes: int) -> dict[Key, float]:
    """Seconds per step in results that as many processes made on this device."""
    known = {}
    for result in iter_results(results):
        if not isinstance(result, Result) or result.cost is None or result.cost.jobs > 1:
            continue
        milliseconds = result.cost.step_milliseconds
        made = result.environment
        if (made.device, made.processes) != (device_name(device), processes) or not milliseconds:
            continue
        protocol, identity = result.protocol, result.identity
        shape = protocol["batch_size"], protocol["data"]["image_size"]
        what = identity.method, identity.architecture, protocol["precision"]
        known[*what, *shape, result.environment.step] = milliseconds / 1000
    return known


def _time_step(spec: RunSpec, device: torch.device, processes: int) -> float:
    """Seconds of a training step on random images, after one to warm up: of the quickest, since
    others' work may disturb one.

    Several processes have a GPU each, or the same CPU together.
    """
    suite = spec.suite
    images = whole = batch_share(suite, processes if device.type == "cuda" else 1)
    size = suite.data.image_size
    method = spec.build_on(device).train()
    method.begin_epoch(0)
    train = TrainingStep(method, build_optimizers(method, suite.optimizer), suite.precision)
    if device.type == "cpu":
        flops = spec.networks * forward_flops(method.student(), size)
        images = min(images, max(2, round(TIMED_FLOPS / flops)))
    views = torch.randn(spec.views, images, size, size, 3, device=device)
    labels = torch.randint(suite.data.classes, (images,), device=device)
    clock = []
    for _ in range(1 + TIMED_STEPS):
        train(views.permute(0, 1, 4, 2, 3), labels)
        clock.append(synchronized_time(device))
    seconds = min(end - start for start, end in pairwise(clock))
    return seconds * whole / images
