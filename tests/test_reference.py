"""Every formula and method equals the reference values, in float64."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from certificates import CERTIFICATES, LOSS_BOUND, PARAMETER_BOUND, agreement, formulas, load
from fidelity import PAGE, deviations
from kdbench.methods.ffsd import FFSD, attention_distance, diversity, shift
from kdbench.methods.kdcl import linear_target, linear_weights
from scipy.optimize import minimize
from torch import Tensor
from torch.testing import assert_close

from kdbench.discovery import find_methods
from kdbench.losses import ramp

CLOSE = {"rtol": LOSS_BOUND, "atol": 1e-14}


@pytest.mark.parametrize("certificate", CERTIFICATES, ids=lambda c: c.name)
def test_three_steps_of_the_authors_code(certificate):
    losses, tensors = agreement(certificate)
    assert max(losses.values()) < LOSS_BOUND, losses
    assert max(tensors.values()) < PARAMETER_BOUND, tensors


def test_the_fidelity_page_lists_every_method_and_its_deviations():
    page = PAGE.read_text(encoding="utf-8")
    for entry in find_methods(["all"]):
        said = deviations(entry.method)
        assert said, f"{entry.name} does not say how it deviates"
        assert f"- **{entry.name}** ({entry.method.paper}): {said}\n" in page


@pytest.mark.parametrize("method", formulas())
def test_formulas_of_the_authors_code(method):
    for ours, theirs in formulas()[method]:
        assert_close(ours, theirs, **CLOSE)


@pytest.fixture(scope="module")
def terms() -> dict[str, Tensor]:
    return load("terms")


def test_cross_entropy(terms):
    losses = [F.cross_entropy(z, terms["labels"]) for z in terms["logits"]]
    assert_close(torch.stack(losses), terms["cross_entropy"], **CLOSE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_kdcl_linear_reaches_the_reference_optimum(terms, dtype):
    logits, labels = terms["logits"].to(dtype), terms["labels"]
    loss = F.cross_entropy(linear_target(logits, labels), labels).item()
    optimum = terms["kdcl/linear_cross_entropy"].item()
    assert optimum - 1e-6 < loss < optimum + 1e-4
    weights = linear_weights(logits, labels)
    assert_close(weights, terms["kdcl/linear_weights"].to(dtype), atol=2e-3, rtol=0)


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


@pytest.mark.parametrize(
    ("distance", "name"),
    [(diversity, "diversity_loss"), (attention_distance, "attention_loss")],
    ids=["diversity", "attention_distance"],
)
def test_ffsd_distances_of_attention_maps(terms, distance, name):
    # Only the attention map enters, so differentiate with respect to a map that has it.
    attention_map = terms["ffsd/feature_x"].square().mean(1, keepdim=True).requires_grad_()
    loss = distance(attention_map.sqrt(), terms["ffsd/feature_y"])
    assert_close(loss, terms[f"ffsd/{name}"], **CLOSE)
    (gradient,) = torch.autograd.grad(loss, attention_map)
    assert_close(gradient, terms[f"ffsd/{name}_grad_x"], rtol=1e-8, atol=1e-14)


def test_ffsd_shift_and_warmup(terms):
    assert_close(shift(terms["ffsd/feature_y"]), terms["ffsd/diversity_target_y"], **CLOSE)
    options = FFSD.Options()
    weights = [options.diversity_weight, options.fusion_weight, options.reconstruction_weight]
    ours = [
        [weight * ramp(epoch, options.warmup_epochs) for weight in weights] for epoch in range(1, 8)
    ]
    np.testing.assert_allclose(ours, terms["ffsd/warmup_epochs_1_to_7"], rtol=1e-12)
