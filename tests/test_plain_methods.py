"""Losses of methods without a reference trace equal their formulas, in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kdbench.discovery import find_methods
from kdbench.method import Cohort, Method, network_roles

K, B, C = 3, 6, 10
LABELS = torch.tensor([3, 1, 3, 7, 1, 0])


def views() -> Tensor:
    """Return different views for each network."""
    draws = torch.Generator().manual_seed(1)
    return torch.randn(K, B, 3, 16, 16, generator=draws, dtype=torch.float64)


def built(name: str) -> Method:
    (entry,) = find_methods([name])
    cohort = Cohort(["resnet8"] * (entry.method.fixed_networks or K), C, seed=0, epochs=300)
    return entry.method(cohort, entry.options({})).double().train()


def log_p(z: Tensor) -> Tensor:
    return z - z.exp().sum().log()


def ce(logits: Tensor, smoothing: float = 0.0) -> Tensor:
    """Return the cross-entropy of logits (B, C)."""
    target = torch.full((B, C), smoothing / C, dtype=logits.dtype)
    target[range(B), LABELS] += 1 - smoothing
    return -sum(t @ log_p(z) for t, z in zip(target, logits, strict=True)) / B


def kl(target: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(target -> logits) of (B, C) logits, as a mean over samples."""
    total = torch.zeros(())
    for t, z in zip(target / temperature, logits / temperature, strict=True):
        total = total + (log_p(t).exp() * (log_p(t) - log_p(z))).sum()
    return temperature**2 * total / B


def smallest_margins(logits: list[Tensor]) -> Tensor:
    """Return KDCL's minimum logit of class c relative to the label, over networks."""
    rows = []
    for sample, label in enumerate(LABELS):
        margins = [z[sample] - z[sample, label] for z in logits]
        rows.append(torch.stack([min(m[c] for m in margins) for c in range(C)]))
    return torch.stack(rows)


def mutual(logits: list[Tensor]) -> list[Tensor]:
    return [
        sum(kl(other, z, 1.0) for j, other in enumerate(logits) if j != i) / (K - 1)
        for i, z in enumerate(logits)
    ]


def collaborative(logits: list[Tensor]) -> list[Tensor]:
    target = smallest_margins(logits)
    return [kl(target, z, 2.0) for z in logits]


Formula = Callable[[list[Tensor]], list[Tensor]]
CASES: dict[str, tuple[bool, float, Formula | None]] = {
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
    method = built(name)
    networks = list(getattr(method, "networks", None) or [method.student()])
    seen = views()
    logits = [network(seen[i * own_view]).logits for i, network in enumerate(networks)]
    expected = {f"ce/{r}": ce(z, smoothing) for r, z in network_roles(logits).items()}
    if formula:
        expected |= {f"kl/{r}": loss for r, loss in network_roles(formula(logits)).items()}
    terms = method(seen if own_view else seen[:1], LABELS)
    assert terms.keys() == expected.keys()
    for term, loss in terms.items():
        torch.testing.assert_close(loss, expected[term].double(), rtol=1e-9, atol=1e-12)
