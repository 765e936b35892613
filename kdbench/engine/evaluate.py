"""Evaluation of every role; each image counts once, nothing is read before the end."""

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
"""Images (B, 3, H, W) -> logits (B, C) by role."""


def evaluate(
    method: Method,
    batches: Iterable[tuple[Tensor, Tensor]],
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Metrics]:
    """Metrics by role: what the method predicts, plus `ensemble` and `mean` of its networks.

    `reduce` sums over processes where each has a share of the images.

    Raises:
        ContractError: the method predicts no `student`, or a role that the harness computes.
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
    """The same of anything that predicts as a method does."""
    sums: dict[str, Tensor] = {}
    for inputs, labels in batches:
        roles = _roles(predict, inputs)
        for role, logits in roles.items():
            counted = _count(logits, labels)
            sums[role] = sums[role] + counted if role in sums else counted
    counts = torch.stack(list(sums.values()))
    rows = (counts if reduce is None else reduce(counts)).tolist()
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
    """Refuse roles without a student, or with one that the harness computes.

    Raises:
        ContractError: says what predict() returned instead.
    """
    if "student" not in roles:
        raise ContractError("predict() returned no role 'student'")
    reserved = {"ensemble", "mean"} & set(roles)
    if reserved:
        role = reserved.pop()
        raise ContractError(f"predict() returned the role '{role}', which kdbench computes")


def _count(logits: Tensor, labels: Tensor) -> Tensor:
    """Right at first guess, right among five, summed cross-entropy, images, and those of them that
    have a loss: (5,) in float64. What is IGNORE_INDEX is wrong and has none.
    """
    guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices
    right = guesses == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX)
    images = loss.new_full((), len(labels))
    counts = (right[:, 0].sum(), right.sum(), loss, images, (labels != IGNORE_INDEX).sum())
    return torch.stack([count.double() for count in counts])


def _metrics(sums: list[float]) -> Metrics:
    top1, top5, loss, images, judged = sums
    return Metrics(top1=100 * top1 / images, top5=100 * top5 / images, loss=loss / judged)


def _mean(networks: list[Metrics]) -> Metrics:
    totals: dict[str, float] = defaultdict(float)
    for metrics in networks:
        for key, value in metrics.model_dump().items():
            totals[key] += value / len(networks)
    return Metrics(**totals)
