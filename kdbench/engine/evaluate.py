"""Evaluation of every role. Each image counts exactly once."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench.data import IGNORE_INDEX
from kdbench.losses import mean_probability_logits
from kdbench.method import ContractError, Method
from kdbench.results.schema import Metrics
from kdbench.roles import is_network

Predict = Callable[[Tensor], dict[str, Tensor]]
"""Function from images (B, 3, H, W) to logits (B, C) by role."""


def evaluate(
    method: Method,
    batches: Iterable[tuple[Tensor, Tensor]],
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Metrics]:
    """Evaluate a method in eval mode, and put it back into train mode.

    Args:
        method: the method to evaluate.
        batches: images (B, 3, H, W) and labels (B,).
        reduce: sums a tensor over all processes, if each has a share of the images.

    Returns:
        Metrics by role: the roles that the method predicts, and `ensemble` and `mean` of its
        networks.

    Raises:
        ContractError: The method predicts no `student`, or a role that the harness computes.
    """
    method.eval()
    metrics = measure(method.predict, batches, reduce)
    method.train()
    return metrics


@torch.no_grad()
def measure(
    predict: Predict,
    batches: Iterable[tuple[Tensor, Tensor]],
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Metrics]:
    """Compute metrics by role like `evaluate`, for any function that predicts logits.

    Sums stay on the device until the end, so no batch waits for it.
    """
    sums: dict[str, Tensor] = {}
    for inputs, labels in batches:
        roles = _roles(predict, inputs)
        for role, logits in roles.items():
            counts = _count(logits, labels)
            sums[role] = sums[role] + counts if role in sums else counts
    totals = torch.stack(list(sums.values()))
    rows = (totals if reduce is None else reduce(totals)).tolist()
    metrics = {role: _metrics(row) for role, row in zip(sums, rows, strict=True)}
    networks = [value for role, value in metrics.items() if is_network(role)]
    if len(networks) > 1:
        metrics["mean"] = _mean(networks)
    return metrics


def _roles(predict: Predict, inputs: Tensor) -> dict[str, Tensor]:
    roles = {role: logits.float() for role, logits in predict(inputs).items()}
    check_roles(roles)
    networks = [logits for role, logits in roles.items() if is_network(role)]
    if len(networks) > 1:
        roles["ensemble"] = mean_probability_logits(networks)
    return roles


def check_roles(roles: Mapping[str, Tensor]) -> None:
    """Check that there is a student, and no role that the harness computes.

    Raises:
        ContractError: There is not; the message says what predict() returned instead.
    """
    if "student" not in roles:
        raise ContractError("predict() returned no role 'student'")
    reserved = {"ensemble", "mean"} & set(roles)
    if reserved:
        role = reserved.pop()
        raise ContractError(f"predict() returned the role '{role}', which kdbench computes")


def _count(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sums over a batch that metrics are computed from, (5,) in float64.

    The sums are: top-1 correct, top-5 correct, cross-entropy, images, images with a loss. Images
    labeled IGNORE_INDEX count as wrong and have no loss.
    """
    guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices
    right = guesses == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX)
    images = loss.new_full((), len(labels))
    with_loss = (labels != IGNORE_INDEX).sum()
    counts = (right[:, 0].sum(), right.sum(), loss, images, with_loss)
    return torch.stack([count.double() for count in counts])


def _metrics(sums: list[float]) -> Metrics:
    top1, top5, loss, images, with_loss = sums
    return Metrics(top1=100 * top1 / images, top5=100 * top5 / images, loss=loss / with_loss)


def _mean(networks: list[Metrics]) -> Metrics:
    totals: dict[str, float] = defaultdict(float)
    for metrics in networks:
        for key, value in metrics.model_dump().items():
            totals[key] += value / len(networks)
    return Metrics(**totals)
