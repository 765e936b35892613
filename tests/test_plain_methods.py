"""Losses of methods without a reference trace equal their formulas, in float64."""

import pytest
import torch
from certificates import build
from torch import Tensor

from kdbench.discovery import find_methods
from kdbench.method import network_roles

K, B = 3, 6
LABELS = torch.tensor([3, 1, 3, 7, 1, 0])


def log_p(z: Tensor) -> Tensor:
    return z - z.exp().sum().log()


def ce(logits: Tensor, labels: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the mean cross-entropy of logits (B, C)."""
    target = torch.full_like(logits, smoothing / logits.shape[1])
    target[range(B), labels] += 1 - smoothing
    return -sum(t @ log_p(z) for t, z in zip(target, logits, strict=True)) / B


def kl(target: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(target -> logits), as a mean over samples; the target is constant."""
    total = torch.zeros(())
    for t, z in zip(target.detach() / temperature, logits / temperature, strict=True):
        total = total + (log_p(t).exp() * (log_p(t) - log_p(z))).sum()
    return temperature**2 * total / B


def mutual(logits: list[Tensor]) -> list[Tensor]:
    return [
        sum(kl(other, z, 1.0) for j, other in enumerate(logits) if j != i) / (K - 1)
        for i, z in enumerate(logits)
    ]


def collaborative(logits: list[Tensor]) -> list[Tensor]:
    """Return the divergences from KDCL's target, the minimum over networks of z_c - z_label."""
    rows = []
    for sample, label in enumerate(LABELS):
        margins = [z[sample] - z[sample, label] for z in logits]
        rows.append(torch.stack([min(of_class) for of_class in zip(*margins, strict=True)]))
    return [kl(torch.stack(rows), z, 2.0) for z in logits]


CASES = {
    "baseline": (False, 0.0, None),
    "label_smoothing": (False, 0.1, None),
    "independent": (False, 0.0, None),
    "dml": (False, 0.0, mutual),
    "kdcl": (True, 0.0, collaborative),
}
"""View per network, label smoothing, and the distillation term."""


@pytest.mark.parametrize("name", CASES)
def test_losses_match_their_formulas(name):
    own_view, smoothing, formula = CASES[name]
    (entry,) = find_methods([name])
    method = build(name, entry.method.fixed_networks or K, num_classes=10)
    networks = list(getattr(method, "networks", None) or [method.student()])
    draws = torch.Generator().manual_seed(1)
    views = torch.randn(K if own_view else 1, B, 3, 16, 16, generator=draws, dtype=torch.float64)
    logits = [network(views[i * own_view]).logits for i, network in enumerate(networks)]
    expected = {f"ce/{r}": ce(z, LABELS, smoothing) for r, z in network_roles(logits).items()}
    if formula:
        expected |= {f"kl/{r}": loss for r, loss in network_roles(formula(logits)).items()}
    torch.testing.assert_close(method(views, LABELS), expected, rtol=1e-9, atol=1e-12)
