"""Construction of results, and the check for divergence."""

import math
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import nn

from kdbench.engine.environment import environment
from kdbench.engine.spec import HARNESS_VERSION, RunSpec
from kdbench.results.schema import Epoch, Metrics, Result, Status


class DivergedError(Exception):
    """Raised when a loss or a weight is no longer finite; names the epoch and the term."""


def check_finite(
    epoch: int, losses: dict[str, float], metrics: dict[str, Metrics], module: nn.Module
) -> None:
    """Check that all losses, evaluations and parameters are finite after an epoch.

    Waits for the device once.

    Args:
        epoch: number of the epoch, counted from 1.
        losses: mean of each loss term over the epoch.
        metrics: evaluation after the epoch, by role.
        module: the method.

    Raises:
        DivergedError: A loss term, an evaluation or a parameter is not finite.
    """
    values = losses | {f"evaluation of {role}": m.loss for role, m in metrics.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise DivergedError(f"'{name}' is {value} in epoch {epoch}")
    # Parameters of modules that predict nothing do not show in any evaluation.
    weights = dict(module.named_parameters())
    finite = torch.stack([weight.isfinite().all() for weight in weights.values()])
    for name, is_finite in zip(weights, finite.tolist(), strict=True):
        if not is_finite:
            raise DivergedError(f"'{name}' is not finite after epoch {epoch}")


def empty_result(
    spec: RunSpec,
    accelerator: Accelerator,
    status: Status,
    reason: str | None = None,
    processes: int | None = None,
) -> Result:
    """Return the result of a run before its first epoch.

    Also used by processes that do not take part in the run, to record that it failed.
    """
    processes = processes or accelerator.num_processes
    command = spec.command() + (f" --num-processes {processes}" if processes > 1 else "")
    command += " --deterministic" if torch.are_deterministic_algorithms_enabled() else ""
    return Result(
        fingerprint=spec.fingerprint(),
        harness=HARNESS_VERSION,
        identity=spec.identity(),
        options=spec.options.model_dump(mode="json"),
        protocol=spec.suite.model_dump(mode="json"),
        status=status,
        reason=reason,
        last=None,
        best_on_test=None,
        history=[],
        cost=None,
        environment=environment(accelerator.device, processes, spec.suite.precision, command),
    )


def epoch_scalars(record: Epoch) -> Iterator[tuple[str, float]]:
    """Yield the numbers of an epoch as pairs of name and value, for a log."""
    yield "learning_rate", record.learning_rate
    for name, value in record.losses.items():
        yield f"loss/{name}", value
    for role, metrics in record.metrics.items():
        for name, value in metrics.model_dump().items():
            yield f"{name}/{role}", value
