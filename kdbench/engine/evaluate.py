"""Evaluation of every role. Each image counts exactly once."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from kdbench.data import IGNORE_INDEX
from kdbench.losses import mean_probability_logits
from kdbench.method import ContractError, Method
from kdbench.results.predictions import LABELS
from kdbench.results.schema import Metrics
from kdbench.roles import is_network

BINS = 15
"""Number of bins of confidence of the expected calibration error."""

SUMS = 6 + 2 * BINS
"""Number of sums that the metrics of a role are computed from."""

PAIRS = "pairs of networks"
"""Key of the sum of disagreements, which is no role."""

Predict = Callable[[Tensor], dict[str, Tensor]]
"""Function from images (B, 3, H, W) to logits (B, C) by role."""


def evaluate(
    method: Method,
    batches: Iterable[tuple[Tensor, Tensor]],
    reduce: Callable[[Tensor], Tensor] | None = None,
    guesses: dict[str, list[Tensor]] | None = None,
) -> dict[str, Metrics]:
    """Evaluate a method in eval mode, and put it back into train mode.

    Args:
        method: the method to evaluate.
        batches: images (B, 3, H, W) and labels (B,).
        reduce: sums a tensor over all processes, if each has a share of the images.
        guesses: receives the predicted classes (B,) of each batch by role, and the labels.

    Returns:
        Metrics by role: the roles that the method predicts, and `ensemble` and `mean` of its
        networks.

    Raises:
        ContractError: The method predicts no `student`, or a role that the harness computes.
    """
    method.eval()
    metrics = measure(method.predict, batches, reduce, guesses)
    method.train()
    return metrics


@torch.no_grad()
def measure(
    predict: Predict,
    batches: Iterable[tuple[Tensor, Tensor]],
    reduce: Callable[[Tensor], Tensor] | None = None,
    guesses: dict[str, list[Tensor]] | None = None,
) -> dict[str, Metrics]:
    """Compute metrics by role like `evaluate`, for any function that predicts logits.

    Sums stay on the device until the end, so no batch waits for it.
    """
    sums: dict[str, Tensor] = {}
    for inputs, labels in batches:
        roles = _roles(predict, inputs)
        counts = {role: _count(logits, labels) for role, logits in roles.items()}
        counts[PAIRS] = _count_disagreements(roles)
        if guesses is not None:
            classes = {role: logits.argmax(dim=1) for role, logits in roles.items()}
            for name, values in (classes | {LABELS: labels}).items():
                guesses.setdefault(name, []).append(values)
        for role, count in counts.items():
            sums[role] = sums[role] + count if role in sums else count
    totals = torch.stack(list(sums.values()))
    rows = dict(zip(sums, totals if reduce is None else reduce(totals), strict=True))
    disagreeing = float(rows.pop(PAIRS)[0])
    metrics = {role: _metrics(row) for role, row in rows.items()}
    networks = [value for role, value in metrics.items() if is_network(role)]
    if len(networks) > 1:
        pairs = math.comb(len(networks), 2) * float(rows["student"][3])
        metrics["mean"] = _mean(networks, disagreement=100 * disagreeing / pairs)
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
    reserved = {"ensemble", "mean", LABELS} & set(roles)
    if reserved:
        role = reserved.pop()
        raise ContractError(f"predict() returned the role '{role}', which kdbench computes")


def _count(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the sums over a batch that metrics are computed from, (SUMS,) in float64.

    The sums are: top-1 correct, top-5 correct, cross-entropy, images, images with a label, squared
    distance from the label; then for each bin the confidence, and for each bin the correct images.
    Images labeled IGNORE_INDEX count as wrong and in no other sum.
    """
    guesses = logits.topk(min(5, logits.shape[1]), dim=1).indices
    right = guesses == labels[:, None]
    loss = F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORE_INDEX)
    images = loss.new_full((), len(labels))
    known = labels != IGNORE_INDEX
    probabilities = logits.softmax(dim=1).double()
    one_hot = F.one_hot(labels.clamp(min=0), logits.shape[1])
    distance = ((probabilities - one_hot).square().sum(dim=1) * known).sum()
    counts = (right[:, 0].sum(), right.sum(), loss, images, known.sum(), distance)
    confidence = probabilities.amax(dim=1)
    bins = F.one_hot(((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1), BINS).double()
    values = torch.stack([confidence, right[:, 0].double()])
    binned = (values * known) @ bins
    return torch.cat([torch.stack([count.double() for count in counts]), binned.flatten()])


def _count_disagreements(roles: Mapping[str, Tensor]) -> Tensor:
    """Return how many images two networks classify differently, summed over pairs of networks.

    It is the first of as many numbers as `_count` returns.
    """
    classes = torch.stack([z.argmax(dim=1) for role, z in roles.items() if is_network(role)])
    sums = torch.zeros(SUMS, dtype=torch.float64, device=classes.device)
    sums[0] = (classes[:, None] != classes[None]).sum() / 2
    return sums


def _metrics(sums: Tensor) -> Metrics:
    top1, top5, loss, images, known, distance, *binned = sums.tolist()
    gaps = [abs(c - r) for c, r in zip(binned[:BINS], binned[BINS:], strict=True)]
    return Metrics(
        top1=100 * top1 / images,
        top5=100 * top5 / images,
        loss=loss / known,
        ece=min(100.0, 100 * sum(gaps) / known),
        brier=distance / known,
    )


def _mean(networks: list[Metrics], disagreement: float) -> Metrics:
    totals: dict[str, float] = defaultdict(float)
    for metrics in networks:
        for key, value in metrics.model_dump().items():
            totals[key] += value / len(networks)
    return Metrics(**totals, disagreement=disagreement)
