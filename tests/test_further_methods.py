"""CL-ILR and MCL equal second implementations, written with loops and without the harness.

Both start from the same weights and see the same three batches, in float64. The second one
computes every loss sample by sample, sends gradients back network by network where the method
detaches its targets, and updates weights by hand.
"""

import copy

import pytest
import torch
from kdbench.methods.cl_ilr import CLILR, consensus
from kdbench.methods.mcl import MCL, contrastive_loss
from torch import Tensor, nn

from kdbench.engine.optimizers import build_optimizers, set_learning_rates
from kdbench.method import Cohort, Method
from kdbench.suite.suite import OptimizerRecipe

LOSS_BOUND, PARAMETER_BOUND = 1e-9, 1e-8
RATE, MOMENTUM, DECAY = 0.05, 0.9, 5e-4
EPOCH = 40  # of 300: the ramps of 80 epochs are half way
LABELS = torch.tensor([[3, 1, 3, 7, 1, 1], [0, 0, 0, 2, 9, 2], [5, 4, 4, 8, 8, 8]])
"""Labels of classes with one, two and three images."""


def build(kind: type[Method], size: int = 3, **options: float) -> Method:
    torch.manual_seed(7)
    cohort = Cohort(["resnet8"] * size, num_classes=10, seed=0, epochs=300)
    method = kind(cohort, kind.Options(**options)).double().train()
    method.begin_epoch(EPOCH)
    return method


def batch(step: int, views: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(100 + step)
    return torch.randn(views, 6, 3, 16, 16, generator=draws, dtype=torch.float64), LABELS[step]


def harness_steps(method: Method, views: int) -> list[dict[str, float]]:
    """Run three steps of kdbench."""
    recipe = OptimizerRecipe(
        learning_rate=RATE, momentum=MOMENTUM, nesterov=True, weight_decay=DECAY
    )
    optimizers = build_optimizers(method, recipe)
    set_learning_rates(optimizers, 1.0)
    trace = []
    for step in range(3):
        terms = method(*batch(step, views))
        for optimizer in optimizers:
            optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
        trace.append({name: term.item() for name, term in terms.items()})
    return trace


class Descent:
    """SGD with Nesterov momentum and weight decay, written out."""

    def __init__(self, *modules: nn.Module):
        self.parameters = list({id(p): p for m in modules for p in m.parameters()}.values())
        self.velocity = [torch.zeros_like(p) for p in self.parameters]
        self.first = True

    def clear(self) -> None:
        for p in self.parameters:
            p.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for p, v in zip(self.parameters, self.velocity, strict=True):
            g = p.grad + DECAY * p
            v.copy_(g if self.first else MOMENTUM * v + g)
            p.sub_(RATE * (g + MOMENTUM * v))
        self.first = False


def probabilities(row: Tensor, temperature: float = 1.0) -> Tensor:
    powers = (row / temperature - row.max() / temperature).exp()
    return powers / powers.sum()


def hard(rows: Tensor, labels: Tensor) -> Tensor:
    total = rows.new_zeros(())
    for row, label in zip(rows, labels, strict=True):
        total = total - probabilities(row)[label].log()
    return total / len(rows)


def soft(targets: Tensor, rows: Tensor, temperature: float) -> Tensor:
    """Return T^2 times the mean of KL(target, row); the target is constant."""
    total = rows.new_zeros(())
    for target, row in zip(targets.detach(), rows, strict=True):
        p, q = probabilities(target, temperature), probabilities(row, temperature)
        for c in range(len(row)):
            total = total + p[c] * (p[c].log() - q[c].log())
    return temperature**2 * total / len(rows)


def name_of(network: int) -> str:
    return "student" if network == 0 else f"peer{network - 1}"


def assert_agree(mine: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    for ours, reference in zip(mine, theirs, strict=True):
        assert ours.keys() == reference.keys()
        for name, value in reference.items():
            assert ours[name] == pytest.approx(value, rel=LOSS_BOUND, abs=1e-15), name


def assert_same_state(mine: nn.Module, theirs: nn.Module) -> None:
    """Return parameters, running statistics and everything else in the state dict."""
    state, reference = mine.state_dict(), theirs.state_dict()
    assert state.keys() == reference.keys()
    for name, value in reference.items():
        error = (state[name] - value).abs().max() / value.abs().max().clamp_min(1e-30)
        assert error < PARAMETER_BOUND, name


# CL-ILR


def cl_ilr_steps(networks: nn.ModuleList, beta: float, temperature: float):
    descent, trunk, count = Descent(networks), networks[0].trunk, len(networks)
    trace = []
    for step in range(3):
        views, labels = batch(step, 1)
        descent.clear()
        shared = trunk(views[0])[-1]
        # Each head gets a leaf of its own, so that what it sends back can be seen.
        leaves = [shared.detach().clone().requires_grad_() for _ in networks]
        logits = [n.branch(leaf)[2] for n, leaf in zip(networks, leaves, strict=True)]
        losses = {}
        for h, z in enumerate(logits):
            target = torch.zeros_like(z)
            for j in range(count):
                if j != h:
                    target += logits[j].detach() / (count - 1)
            losses[f"ce/{name_of(h)}"] = beta * hard(z, labels)
            losses[f"kl/{name_of(h)}"] = (1 - beta) * soft(target, z, temperature)
            (losses[f"ce/{name_of(h)}"] + losses[f"kl/{name_of(h)}"]).backward()
        mean = torch.zeros_like(shared)
        for leaf in leaves:
            mean += leaf.grad / count
        shared.backward(mean)
        descent.step()
        trace.append({name: loss.item() for name, loss in losses.items()})
    return trace


@pytest.mark.parametrize(("size", "options"), [(3, {}), (2, {}), (4, {"beta": 0.3})])
def test_cl_ilr_equals_a_second_implementation(size: int, options: dict[str, float]):
    method = build(CLILR, size, **options)
    other = copy.deepcopy(method.networks)
    mine = harness_steps(method, views=1)
    assert_agree(mine, cl_ilr_steps(other, options.get("beta", 0.5), temperature=2.0))
    assert_same_state(method.networks, other)


def test_the_consensus_excludes_the_head_itself():
    logits = [torch.full((1, 2), value) for value in (1.0, 2.0, 6.0)]
    assert [t[0, 0].item() for t in consensus(logits)] == [4.0, 3.5, 1.5]


def test_the_trunk_of_cl_ilr_gets_a_share_of_each_heads_gradient():
    method = build(CLILR)
    views, labels = batch(0, 1)
    trunk = list(method.networks[0].trunk.parameters())
    head = list(method.networks[0].branch.parameters())
    loss = method(views, labels)["ce/student"]
    scaled = torch.autograd.grad(loss, trunk + head)
    plain = torch.autograd.grad(
        0.5 * hard(method.networks[0](views[0]).logits, labels), trunk + head
    )
    for index, (mine, reference) in enumerate(zip(scaled, plain, strict=True)):
        factor = 3 if index < len(trunk) else 1
        torch.testing.assert_close(factor * mine, reference)


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


def mcl_steps(networks: nn.ModuleList, heads: nn.ModuleList, tau: float = 0.07):
    descent, count = Descent(networks, heads), len(networks)
    trace = []
    for step in range(3):
        views, labels = batch(step, 1)
        descent.clear()
        outputs = [network(views[0]) for network in networks]
        units = []
        for head, output in zip(heads, outputs, strict=True):
            first, _, last = head.layers
            hidden = (output.embedding @ first.weight.T + first.bias).clamp(min=0)
            projected = hidden @ last.weight.T + last.bias
            units.append(torch.stack([row / row.square().sum().sqrt() for row in projected]))
        losses = {}
        for i in range(count):
            role, peers = name_of(i), [j for j in range(count) if j != i]
            losses[f"ce/{role}"] = hard(outputs[i].logits, labels)
            losses[f"vcl/{role}"] = 0.1 * contrast(units[i], units[i], labels, tau)
            own, own_soft = units[i] @ units[i].T / tau, []
            across, across_soft = [], []
            for j in peers:
                across.append(contrast(units[i], units[j], labels, tau))
                own_soft.append(soft(units[j] @ units[j].T / tau, own, 3.0))
                reverse = torch.stack([units[i] @ row / tau for row in units[j]])
                across_soft.append(soft(reverse, units[i] @ units[j].T / tau, 3.0))
            losses[f"icl/{role}"] = 0.1 * sum(across)
            losses[f"soft_vcl/{role}"] = sum(own_soft)
            losses[f"soft_icl/{role}"] = sum(across_soft)
        for loss in losses.values():
            loss.backward(retain_graph=True)
        descent.step()
        trace.append({name: loss.item() for name, loss in losses.items()})
    return trace


@pytest.mark.parametrize("size", [2, 3])
def test_mcl_equals_a_second_implementation(size: int):
    method = build(MCL, size)
    other, heads = copy.deepcopy(method.networks), copy.deepcopy(method.projections)
    mine = harness_steps(method, views=1)
    assert_agree(mine, mcl_steps(other, heads))
    assert_same_state(method.networks, other)
    assert_same_state(method.projections, heads)


def test_anchors_without_a_positive_are_ignored():
    similarity = torch.randn(4, 4, requires_grad=True)
    labels = torch.tensor([0, 0, 1, 2])
    loss = contrastive_loss(similarity, labels)
    loss.backward()
    assert similarity.grad[2:].count_nonzero() == 0
    assert similarity.grad.diagonal().count_nonzero() == 0
    alone = contrastive_loss(similarity.detach().requires_grad_(), torch.arange(4))
    assert alone.item() == 0


# All three


def touched(method: Method, term: str, views: int) -> list[bool]:
    """Return for each network True if the term trains its own parameters."""
    loss = method(*batch(0, views))[term]
    parameters = [list(network.branch.parameters()) for network in method.networks]
    found = []
    for own in parameters:
        gradients = torch.autograd.grad(loss, own, retain_graph=True, allow_unused=True)
        found.append(any(g is not None and g.count_nonzero() > 0 for g in gradients))
    return found


@pytest.mark.parametrize(
    ("kind", "views", "terms"),
    [
        (CLILR, 1, ["ce", "kl"]),
        (MCL, 1, ["ce", "vcl", "soft_vcl"]),
    ],
)
def test_detached_targets_give_other_networks_no_gradient(
    kind: type[Method], views: int, terms: list[str]
):
    method = build(kind)
    for term in terms:
        for index in range(3):
            expected = [other == index for other in range(3)]
            assert touched(method, f"{term}/{name_of(index)}", views) == expected, term


def test_icl_trains_all_networks():
    assert touched(build(MCL), "icl/student", 1) == [True] * 3
    assert touched(build(MCL), "soft_icl/peer0", 1) == [True] * 3


@pytest.mark.parametrize("size", [2, 8])
@pytest.mark.parametrize(("kind", "each_view"), [(CLILR, False), (MCL, False)])
def test_two_to_eight_networks(kind: type[Method], each_view: bool, size: int):
    method = build(kind, size)
    terms: dict[str, Tensor] = method(*batch(0, size if each_view else 1))
    assert all(term.shape == () and term.isfinite() for term in terms.values())
    method.eval()
    roles = method.predict(batch(0, 1)[0][0])
    assert {name_of(i) for i in range(size)} <= roles.keys()
    assert roles.keys().isdisjoint({"ensemble", "mean"})
    images = batch(0, 1)[0][0]
    torch.testing.assert_close(method.student()(images).logits, roles["student"])
