"""CL-ILR and MCL equal second implementations, written with loops and without the harness.

Both start from the same weights and see the same three batches, in float64. The second one
computes every loss sample by sample, detaches what one network sends to another, and updates
weights by hand.
"""

import copy
from collections.abc import Callable

import pytest
import torch
from certificates import LOSS_BOUND, MOMENTUM, PARAMETER_BOUND, RATE, Values, build, replay
from kdbench.methods.cl_ilr import consensus
from kdbench.methods.mcl import contrastive_loss
from test_plain_methods import ce, kl
from torch import Tensor
from torch.testing import assert_close

from kdbench.method import Method

DECAY = 5e-4
ROLES = ["student", "peer0", "peer1", "peer2"]
LABELS = torch.tensor([[3, 1, 3, 7, 1, 1], [0, 0, 0, 2, 9, 2], [5, 4, 4, 8, 8, 8]])
"""Labels of classes with one, two and three images."""

ByHand = Callable[[Method, Tensor, Tensor], Values]
"""Computes the losses of images and labels, and the gradients of all parameters."""


def batches() -> list[tuple[Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(100)
    shape = (len(LABELS), 1, 6, 3, 16, 16)
    return list(zip(torch.randn(shape, generator=draws, dtype=torch.float64), LABELS, strict=True))


def train_by_hand(method: Method, by_hand: ByHand) -> Values:
    """SGD with Nesterov momentum and weight decay, written out; return all losses by step."""
    parameters = list(method.parameters())
    velocities = [torch.zeros_like(p) for p in parameters]
    trace: list[Values] = []
    for views, labels in batches():
        method.zero_grad()
        trace.append(by_hand(method, views[0], labels))
        with torch.no_grad():
            for p, velocity in zip(parameters, velocities, strict=True):
                gradient = p.grad + DECAY * p
                velocity.mul_(MOMENTUM).add_(gradient)
                p.sub_(RATE * (gradient + MOMENTUM * velocity))
    return {name: torch.stack([losses[name].detach() for losses in trace]) for name in trace[0]}


def assert_equal_training(method: Method, by_hand: ByHand) -> None:
    """Compare all losses, parameters, running statistics and other buffers after three steps."""
    other = copy.deepcopy(method)
    losses = replay(method, batches(), DECAY)
    assert_close(losses, train_by_hand(other, by_hand), rtol=LOSS_BOUND, atol=1e-15)
    assert_close(method.state_dict(), other.state_dict(), rtol=PARAMETER_BOUND, atol=1e-12)


@pytest.mark.parametrize(("size", "beta"), [(3, 0.5), (2, 0.5), (4, 0.3)])
def test_cl_ilr_equals_a_second_implementation(size: int, beta: float):
    def by_hand(method: Method, images: Tensor, labels: Tensor) -> Values:
        shared = method.networks[0].trunk(images)[-1]
        # Each head gets a leaf of its own, so that what it sends back can be seen.
        leaves = [shared.detach().clone().requires_grad_() for _ in method.networks]
        heads = zip(method.networks, leaves, strict=True)
        logits = [network.branch(leaf)[2] for network, leaf in heads]
        losses = {}
        for head, (role, z) in enumerate(zip(ROLES, logits, strict=False)):
            others = [other for index, other in enumerate(logits) if index != head]
            losses[f"ce/{role}"] = beta * ce(z, labels)
            losses[f"kl/{role}"] = (1 - beta) * kl(sum(others) / len(others), z, temperature=2.0)
        sum(losses.values()).backward()
        shared.backward(sum(leaf.grad for leaf in leaves) / size)
        return losses

    assert_equal_training(build("cl_ilr", size, num_classes=10, beta=str(beta)), by_hand)


def test_the_consensus_excludes_the_head_itself():
    logits = [torch.full((1, 2), value) for value in (1.0, 2.0, 6.0)]
    assert [t[0, 0].item() for t in consensus(logits)] == [4.0, 3.5, 1.5]


def contrast(anchors: Tensor, samples: Tensor, labels: Tensor, tau: float) -> Tensor:
    """Return the mean over anchors with positives, as a loop over pairs."""
    losses = []
    for a, anchor in enumerate(anchors):
        others = [b for b in range(len(samples)) if b != a]
        positives = [b for b in others if labels[b] == labels[a]]
        if positives:
            total = sum((anchor @ samples[b] / tau).exp() for b in others)
            logs = [(anchor @ samples[b] / tau).exp().div(total).log() for b in positives]
            losses.append(-sum(logs) / len(positives))
    return sum(losses) / len(losses)


def mcl_by_hand(method: Method, images: Tensor, labels: Tensor, tau: float = 0.07) -> Values:
    outputs = [network(images) for network in method.networks]
    units = []
    for head, output in zip(method.projections, outputs, strict=True):
        first, _, last = head.layers
        hidden = (output.embedding @ first.weight.T + first.bias).clamp(min=0)
        projected = hidden @ last.weight.T + last.bias
        units.append(torch.stack([row / row.square().sum().sqrt() for row in projected]))
    losses = {}
    for role, output, mine in zip(ROLES, outputs, units, strict=False):
        peers = [unit for unit in units if unit is not mine]
        losses[f"ce/{role}"] = ce(output.logits, labels)
        losses[f"vcl/{role}"] = 0.1 * contrast(mine, mine, labels, tau)
        losses[f"icl/{role}"] = 0.1 * sum(contrast(mine, peer, labels, tau) for peer in peers)
        losses[f"soft_vcl/{role}"] = sum(
            kl(peer @ peer.T / tau, mine @ mine.T / tau, temperature=3.0) for peer in peers
        )
        losses[f"soft_icl/{role}"] = sum(
            kl(peer @ mine.T / tau, mine @ peer.T / tau, temperature=3.0) for peer in peers
        )
    sum(losses.values()).backward()
    return losses


@pytest.mark.parametrize("size", [2, 3])
def test_mcl_equals_a_second_implementation(size: int):
    assert_equal_training(build("mcl", size, num_classes=10), mcl_by_hand)


def test_anchors_without_a_positive_are_ignored():
    similarity = torch.randn(4, 4, requires_grad=True)
    contrastive_loss(similarity, torch.tensor([0, 0, 1, 2])).backward()
    assert similarity.grad[2:].count_nonzero() == 0
    assert similarity.grad.diagonal().count_nonzero() == 0
    assert contrastive_loss(similarity.detach(), torch.arange(4)) == 0


def test_only_icl_trains_other_networks():
    method = build("mcl", 3, num_classes=10)
    for term, loss in method(*batches()[0]).items():
        trained = set()
        for other, network in zip(ROLES, method.networks, strict=False):
            branch = list(network.branch.parameters())
            found = torch.autograd.grad(loss, branch, retain_graph=True, allow_unused=True)
            trained |= {other for gradient in found if gradient is not None and gradient.any()}
        kind, role = term.split("/")
        assert trained == (set(ROLES[:3]) if kind in ("icl", "soft_icl") else {role}), term
