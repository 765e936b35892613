"""What a run comes to: its epochs, and the result it has before the first."""

import math
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import nn

from kdbench.engine.environment import environment
from kdbench.engine.spec import HARNESS_VERSION, RunSpec
from kdbench.results.schema import Epoch, Metrics, Result, Status


class DivergedError(Exception):
    """A loss or a weight is not finite any more; names the first epoch and term."""


def check_finite(
    epoch: int, losses: dict[str, float], metrics: dict[str, Metrics], module: nn.Module
) -> None:
    """Find out that an epoch, counted from 1, made no numbers; waits for the device once.

    Raises:
        DivergedError: a term, an evaluation or a parameter is not finite.
    """
    values = losses | {f"evaluation of {role}": m.loss for role, m in metrics.items()}
    for name, value in values.items():
        if not math.isfinite(value):
            raise DivergedError(f"'{name}' is {value} in epoch {epoch}")
    # What predicts nothing shows in no evaluation.
    weights = dict(module.named_parameters())
    finite = torch.stack([weight.isfinite().all() for weight in weights.values()])
    for name, holds in zip(weights, finite.tolist(), strict=True):
        if not holds:
            raise DivergedError(f"'{name}' is not finite after epoch {epoch}")


def empty_result(
    spec: RunSpec,
    accelerator: Accelerator,
    status: Status,
    reason: str | None = None,
    processes: int | None = None,
) -> Result:
    """What is known of a run before its first epoch; this process may be none of its own."""
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


def scalars(record: Epoch) -> Iterator[tuple[str, float]]:
    """An epoch as name and value, for a log."""
    yield "learning_rate", record.learning_rate
    for name, value in record.losses.items():
        yield f"loss/{name}", value
    for role, metrics in record.metrics.items():
        for name, value in metrics.model_dump().items():
            yield f"{name}/{role}", value
