"""How long a plan will take: from results made on this device, else from steps timed now."""

from pathlib import Path

import torch

from kdbench.engine.environment import device_name
from kdbench.engine.measure import forward_flops, synchronised_clock
from kdbench.engine.optimizers import build_optimizers
from kdbench.engine.spec import RunSpec
from kdbench.engine.step import TrainingStep
from kdbench.errors import UserError
from kdbench.launch.plan import PlannedRun
from kdbench.store import Result, read_all

TIMED_STEPS = 2

TIMED_FLOPS = 5e10
"""Of a timed forward pass on a CPU, whose time is in proportion to the batch: 256 large images
would take minutes and gigabytes. On a GPU the whole batch is timed."""


def estimate_seconds(plan: list[PlannedRun], results: Path, device: torch.device) -> list[float]:
    """Seconds of training for each run of the plan; 0 where its result exists."""
    known = _measured(results, device)
    seconds = []
    for run in plan:
        key = _key(run.spec)
        if run.state == "to run" and key not in known:
            try:
                known[key] = _time_step(run.spec, device)
            except Exception as error:  # a method may raise anything, and would in the run
                what = run.spec.entry.blame(error).split("\n")[0]
                raise UserError(f"Method '{run.spec.entry.name}' fails: {what}.") from error
        remaining = run.spec.suite.total_steps if run.state == "to run" else 0
        seconds.append(remaining * known.get(key, 0.0))
    return seconds


def _key(spec: RunSpec) -> tuple[str, str, int, int]:
    """What the time of a step depends on."""
    suite = spec.suite
    return spec.method_name, spec.architecture, suite.batch_size, suite.data.image_size


def _measured(results: Path, device: torch.device) -> dict[tuple[str, str, int, int], float]:
    """Seconds per step in results that this device made."""
    known = {}
    for result in read_all(results):
        if not isinstance(result, Result) or result.cost is None or result.cost.jobs > 1:
            continue
        milliseconds = result.cost.step_milliseconds
        if milliseconds is None or result.environment.device != device_name(device):
            continue
        size, batch = result.protocol["data"]["image_size"], result.protocol["batch_size"]
        identity = result.identity
        known[identity.method, identity.architecture, batch, size] = milliseconds / 1000
    return known


def _time_step(spec: RunSpec, device: torch.device) -> float:
    """Seconds of a training step on random images, after one to warm up."""
    suite = spec.suite
    size = suite.data.image_size
    method = spec.build_on(device).train()
    method.begin_epoch(0)
    train = TrainingStep(method, build_optimizers(method, suite.optimizer), suite.precision)
    batch = suite.batch_size
    if device.type == "cpu":
        flops = spec.networks * forward_flops(method.student(), size)
        batch = min(batch, max(2, round(TIMED_FLOPS / flops)))
    views = torch.randn(spec.views, batch, size, size, 3, device=device)
    labels = torch.randint(suite.data.classes, (batch,), device=device)
    started = 0.0
    for step in range(1 + TIMED_STEPS):
        if step == 1:
            started = synchronised_clock(device)
        train(views.permute(0, 1, 4, 2, 3), labels)
    seconds = (synchronised_clock(device) - started) / TIMED_STEPS
    return seconds * suite.batch_size / batch
