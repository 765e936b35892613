"""Properties that the formulas of the methods have for all numbers, whatever they are."""

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis import given
from hypothesis.extra.numpy import arrays
from kdbench.methods.okddip import PeerAttention, mixed_targets
from kdbench.methods.one import Gate, gated_logits
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.testing import assert_close

from kdbench import losses
from kdbench.losses import kl, mutual_kl, ramp
from kdbench.methods import kdcl

CLOSE = {"rtol": 1e-9, "atol": 1e-9}
temperatures = st.floats(0.5, 20)
scales = st.floats(1e-3, 1e3)


def tensors(*shape: int, largest: float = 30.0) -> st.SearchStrategy[Tensor]:
    """Strategy of float64 logits in which zeros and equal numbers are frequent."""
    numbers = st.floats(-largest, largest, allow_subnormal=False)
    return arrays(np.float64, shape, elements=numbers).map(torch.from_numpy)


def orders(networks: int) -> st.SearchStrategy[list[int]]:
    return st.permutations(range(networks))


@given(tensors(3, 5), tensors(3, 5), tensors(3, 1), temperatures)
def test_kl_is_a_divergence_scaled_by_the_square_of_the_temperature(
    target, logits, shift, temperature
):
    for epsilon in (0.0, 1e-7):
        assert kl(target, logits, temperature, epsilon) >= -1e-9
    assert abs(kl(logits, logits, temperature)) < 1e-9
    assert abs(kl(logits + shift, logits, temperature)) < 1e-9
    softened = kl(temperature * target, temperature * logits, temperature)
    assert_close(softened, temperature**2 * kl(target, logits), **CLOSE)
    apart = (target.softmax(1) - logits.softmax(1)).abs().sum(1).square().mean()
    assert kl(target, logits) >= apart / 2 - 1e-9  # Pinsker's inequality


@given(tensors(4, 3, 5), orders(4), temperatures)
def test_dml_and_the_ensemble_are_invariant_to_the_order_of_networks(logits, order, temperature):
    divergences = torch.stack(mutual_kl(list(logits), temperature))
    permuted = torch.stack(mutual_kl(list(logits[order]), temperature))
    assert_close(permuted, divergences[order], **CLOSE)
    ensemble = losses.mean_probability_logits(list(logits))
    assert_close(ensemble.exp().sum(1), torch.ones(3).double(), **CLOSE)
    assert_close(losses.mean_probability_logits(list(logits[order])), ensemble, **CLOSE)


@given(tensors(4, 3, 5), orders(4), st.lists(st.integers(0, 4), min_size=3, max_size=3))
def test_kdcl_is_invariant_to_the_order_of_networks(logits, order, classes):
    labels = torch.tensor(classes)
    smallest = kdcl.minlogit_target(logits, labels)
    assert_close(kdcl.minlogit_target(logits[order], labels), smallest, **CLOSE)
    # Of networks that are equally good, the first counts; the best convex mix may not be the only.
    for target, tolerance in ((kdcl.naive_target, 1e-9), (kdcl.linear_target, 1e-4)):
        mine, theirs = (
            cross_entropy(target(given_logits, labels), labels, reduction="none")
            for given_logits in (logits, logits[order])
        )
        assert_close(mine, theirs, rtol=0, atol=tolerance)


@given(tensors(4, 6, 5, largest=4), orders(4), st.integers(0, 4))
def test_the_general_weights_of_kdcl_are_equivariant_and_sum_to_one(logits, order, label):
    labels = torch.full((6,), label)
    correlation = kdcl.error_correlation(logits.softmax(2), labels) + 1e-3 * torch.eye(4)
    weights = kdcl.general_weights(correlation)
    assert_close(weights.sum(), torch.ones(()).double(), **CLOSE)
    permuted = kdcl.general_weights(correlation[order][:, order])
    assert_close(permuted, weights[order], rtol=1e-6, atol=1e-6)


@given(tensors(3, 2, 16), tensors(3, 2, 5), orders(3))
def test_okddip_is_invariant_to_the_order_of_peers_and_weights_sum_to_one(
    embeddings, logits, order
):
    torch.manual_seed(0)
    listens = PeerAttention(16).double()
    weights = listens(embeddings)
    assert (weights >= 0).all()
    assert_close(weights.sum(2), torch.ones(2, 3).double(), **CLOSE)
    targets = mixed_targets(weights, logits)
    permuted = mixed_targets(listens(embeddings[order]), logits[order])
    assert_close(permuted, targets[order], rtol=1e-7, atol=1e-7)


@given(tensors(4, 3, 2, 2), tensors(2, 4, 5), orders(2), st.booleans())
def test_the_gate_of_one_is_invariant_to_the_order_of_branches(maps, logits, order, training):
    torch.manual_seed(0)
    gate = Gate(3, 2).double().train(training)
    gates = gate(maps)
    assert (gates >= 0).all()
    assert_close(gates.sum(1), torch.ones(4).double(), **CLOSE)
    mixed = gated_logits(gates, list(logits))
    permuted = gated_logits(gates[:, order], list(logits[order]))
    assert_close(permuted, mixed, **CLOSE)
    low, high = logits.amin(0), logits.amax(0)
    assert ((mixed >= low - 1e-9) & (mixed <= high + 1e-9)).all()


@given(tensors(2, 3, 2, 2), tensors(2, 3, 2, 2), scales, scales)
def test_the_normalised_distance_is_scale_invariant(x, y, mine, theirs):
    # Far from zero, so that the direction of a sample does not depend on rounding.
    x, y = (torch.where(features.abs() < 0.1, 0.1, features) for features in (x, y))
    distance = losses.normalised_distance(x, y)
    assert_close(losses.normalised_distance(mine * x, theirs * y), distance, **CLOSE)
    assert_close(losses.normalised_distance(y, x), distance, **CLOSE)
    assert 0 <= distance <= 4 / 12 + 1e-9  # of unit vectors, over the 12 numbers of a sample
    assert losses.normalised_distance(x, mine * x) < 1e-12


@given(tensors(2, 3, 2, 2), scales, st.permutations(range(3)))
def test_an_attention_map_sums_squares_over_channels(x, scale, order):
    seen = losses.attention(x)
    assert seen.shape == (2, 1, 2, 2) and (seen >= 0).all()
    assert_close(losses.attention(x[:, order]), seen, **CLOSE)
    assert_close(losses.attention(scale * x), scale**2 * seen, **CLOSE)


@given(st.floats(0, 400), st.floats(0, 400), st.floats(0, 300))
def test_a_ramp_rises_from_zero_to_one_and_stays(epoch, later, length):
    first, second = sorted([epoch, later])
    assert 0 <= ramp(first, length) <= ramp(second, length) <= 1
    assert ramp(length, length) == ramp(length + epoch, length) == 1
    assert length <= 0 or ramp(0, length) < 0.007
