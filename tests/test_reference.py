"""Every formula and method equals the reference values, in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from certificates import (
    CERTIFICATES,
    LOSS_BOUND,
    PARAMETER_BOUND,
    Certificate,
    agreement,
    load,
    tensors,
)
from fidelity import PAGE, deviations
from kdbench.methods.ffsd import FFSD, attention_distance, diversity, shift
from kdbench.methods.kdcl import (
    error_correlation,
    general_weights,
    linear_target,
    linear_weights,
    minlogit_target,
    naive_target,
)
from scipy.optimize import minimize
from torch import Tensor

from kdbench.discovery import find_methods
from kdbench.losses import kl, mutual_kl, ramp

CLOSE = {"rtol": LOSS_BOUND, "atol": 1e-14}


@pytest.mark.parametrize("certificate", CERTIFICATES, ids=lambda c: c.name)
def test_three_steps_of_the_authors_code(certificate: Certificate):
    found = agreement(certificate)
    assert max(found.losses.values()) < LOSS_BOUND, found.losses
    assert max(found.parameters.values()) < PARAMETER_BOUND, found.parameters


def test_the_fidelity_page_lists_every_method_and_its_deviations():
    page = PAGE.read_text(encoding="utf-8")
    for entry in find_methods(["all"]):
        said = deviations(entry.method)
        assert said, f"{entry.name} does not say how it deviates"
        assert f"- **{entry.name}** ({entry.method.paper}): {said}\n" in page


@pytest.fixture(scope="module")
def terms() -> dict[str, Tensor]:
    return tensors(load("terms"), "")


def test_cross_entropy_and_mutual_kl(terms):
    logits, labels = terms["logits"], terms["labels"]
    ce = torch.stack([F.cross_entropy(z, labels) for z in logits])
    np.testing.assert_allclose(ce, terms["cross_entropy"], **CLOSE)
    np.testing.assert_allclose(torch.stack(mutual_kl(list(logits))), terms["dml/kl_T1"], **CLOSE)
    softened = torch.stack(mutual_kl(list(logits), temperature=2.0))
    np.testing.assert_allclose(softened, terms["dml/kl_T2_scaled"], **CLOSE)


def test_kl_is_summed_over_classes_and_averaged_over_the_batch():
    target, logits = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.zeros(2, 2)
    p = target.softmax(1)
    expected = (p * (p.log() - np.log(0.5))).sum() / 2
    torch.testing.assert_close(kl(target, logits), expected)


def test_kdcl_targets(terms):
    logits, labels = terms["logits"], terms["labels"]
    naive = naive_target(logits, labels)
    np.testing.assert_allclose(naive, terms["kdcl/naive_target"], **CLOSE)
    smallest = minlogit_target(logits, labels)
    np.testing.assert_allclose(smallest, terms["kdcl/minlogit_target"], **CLOSE)


def test_kdcl_general(terms):
    correlation = error_correlation(
        terms["kdcl/general_probabilities"], terms["kdcl/general_labels"]
    )
    np.testing.assert_allclose(correlation, terms["kdcl/general_correlation"], **CLOSE)
    weights = general_weights(correlation)
    np.testing.assert_allclose(weights, terms["kdcl/general_weights"], **CLOSE)
    target = torch.einsum("k,kbc->bc", weights, terms["logits"])
    np.testing.assert_allclose(target, terms["kdcl/general_target"], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kdcl_linear_reaches_the_reference_optimum(terms, dtype):
    logits, labels = terms["logits"].to(dtype), terms["labels"]
    loss = F.cross_entropy(linear_target(logits, labels), labels).item()
    optimum = terms["kdcl/linear_cross_entropy"].item()
    assert optimum - 1e-6 < loss < optimum + 1e-4
    weights = linear_weights(logits, labels)
    torch.testing.assert_close(weights, terms["kdcl/linear_weights"].to(dtype), atol=2e-3, rtol=0)


@pytest.mark.parametrize(("networks", "scale"), [(2, 1.0), (3, 10.0), (8, 3.0), (8, 30.0)])
def test_kdcl_linear_is_within_1e_4_of_a_general_solver(networks: int, scale: float):
    generator = torch.Generator().manual_seed(networks)
    logits = scale * torch.randn(networks, 16, 20, generator=generator)
    labels = torch.randint(20, (16,), generator=generator)
    ours = F.cross_entropy(linear_target(logits, labels).double(), labels, reduction="none")
    for sample, label in enumerate(labels.tolist()):
        z = logits[:, sample].double().numpy()

        def objective(a: np.ndarray, z: np.ndarray = z, label: int = label) -> float:
            mixed = a @ z
            return float(np.log(np.exp(mixed - mixed.max()).sum()) + mixed.max() - mixed[label])

        solved = minimize(
            objective,
            np.full(networks, 1 / networks),
            bounds=[(0, 1)] * networks,
            constraints={"type": "eq", "fun": lambda a: a.sum() - 1},
            options={"ftol": 1e-12, "maxiter": 500},
        )
        assert ours[sample].item() < solved.fun + 1e-4


def test_ffsd_diversity(terms):
    # Only the attention map enters, so differentiate with respect to a map that has it.
    attention_map = terms["ffsd/feature_x"].square().mean(1, keepdim=True).requires_grad_()
    loss = diversity(attention_map.sqrt(), terms["ffsd/feature_y"])
    np.testing.assert_allclose(loss.item(), terms["ffsd/diversity_loss"], **CLOSE)
    (gradient,) = torch.autograd.grad(loss, attention_map)
    np.testing.assert_allclose(gradient, terms["ffsd/diversity_loss_grad_x"], rtol=1e-8, atol=1e-14)
    shifted = shift(terms["ffsd/feature_y"])
    np.testing.assert_allclose(shifted, terms["ffsd/diversity_target_y"], **CLOSE)


def test_ffsd_attention_distance(terms):
    attention_map = terms["ffsd/feature_x"].square().mean(1, keepdim=True).requires_grad_()
    loss = attention_distance(attention_map.sqrt(), terms["ffsd/feature_y"])
    np.testing.assert_allclose(loss.item(), terms["ffsd/attention_loss"], **CLOSE)
    (gradient,) = torch.autograd.grad(loss, attention_map)
    np.testing.assert_allclose(gradient, terms["ffsd/attention_loss_grad_x"], rtol=1e-8, atol=1e-14)


def test_ffsd_warmup(terms):
    options = FFSD.Options()
    weights = [options.diversity_weight, options.fusion_weight, options.reconstruction_weight]
    ours = [
        [weight * ramp(epoch, options.warmup_epochs) for weight in weights] for epoch in range(1, 8)
    ]
    np.testing.assert_allclose(ours, terms["ffsd/warmup_epochs_1_to_7"], rtol=1e-12)
