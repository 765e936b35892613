"""Online Knowledge Distillation via Collaborative Learning."""

from collections.abc import Callable, Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdbench.losses import kl
from kdbench.method import VIEW_PER_NETWORK, Cohort, Method, MethodOptions, network_roles

STEP_LENGTHS = (1.0, 0.5, 0.25, 0.1, 0.02, 0.0)
"""Step lengths tried in each step of `linear_weights`, relative to the edge of the simplex."""

Target = Callable[[Tensor, Tensor], Tensor]


def naive_target(logits: Tensor, labels: Tensor) -> Tensor:
    """Select for each sample the logits with the lowest cross-entropy: (K, B, C) -> (B, C)."""
    losses = torch.stack([F.cross_entropy(z, labels, reduction="none") for z in logits])
    best = losses.argmin(dim=0)
    return logits[best, torch.arange(len(labels), device=labels.device)]


def minlogit_target(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the minimum logits t_c = min_i (z_i,c - z_i,y): (K, B, C) -> (B, C)."""
    index = labels.expand(len(logits), -1).unsqueeze(2)
    return (logits - logits.gather(2, index)).amin(dim=0)


def linear_weights(logits: Tensor, labels: Tensor, steps: int = 20) -> Tensor:
    """Compute weights on the simplex, (B, K), that minimize CE(sum_i a_i z_i, y) for each sample.

    The problems are convex with K unknowns. All are solved at once by a barrier method: a Newton
    step for each halving of the barrier, so that K * 2^-20 bounds the distance to the optimum.
    Nothing depends on the data but the numbers, so a captured step can hold it.
    """
    scores = logits.permute(1, 2, 0)  # (B, C, K)
    samples, _, networks = scores.shape
    own = scores[torch.arange(samples, device=labels.device), labels]  # (B, K)
    weights = scores.new_full((samples, networks), 1 / networks)
    # Filled on the device, because a captured step must not copy from the host.
    shrink = torch.stack([scores.new_full((), part) for part in STEP_LENGTHS])
    identity = torch.eye(networks, dtype=scores.dtype, device=scores.device)

    def objective(a: Tensor, barrier: float) -> Tensor:
        """(S, B, K) -> (S, B), shifted by a constant."""
        mixed = torch.einsum("bck,sbk->sbc", scores, a)
        loss = mixed.logsumexp(dim=2) - (own * a).sum(dim=2)
        return loss - barrier * a.log().sum(dim=2)

    for step in range(1, steps + 1):
        barrier = 0.5**step
        p = F.softmax(torch.einsum("bck,bk->bc", scores, weights), dim=1)
        mean = torch.einsum("bck,bc->bk", scores, p)
        centred = scores - mean.unsqueeze(1)
        hessian = torch.einsum("bci,bc,bcj->bij", centred, p, centred)
        gradient = mean - own - barrier / weights
        # Scaled by the weights, the barrier's Hessian is a multiple of the identity, so the system
        # is well conditioned.
        scaled = weights.unsqueeze(2) * hessian * weights.unsqueeze(1) + barrier * identity
        sides = torch.stack([weights * gradient, weights], dim=2)
        solved = torch.linalg.solve_ex(scaled, sides).result * weights.unsqueeze(2)
        along, ones = solved.unbind(dim=2)
        direction = ones * (along.sum(1) / ones.sum(1)).unsqueeze(1) - along
        # Stay inside the simplex, then take the best of a few step lengths.
        reach = (-direction / weights).amax(dim=1, keepdim=True).clamp_min(0.99).reciprocal() * 0.99
        candidates = weights + shrink[:, None, None] * reach * direction
        best = objective(candidates, barrier).argmin(dim=0)
        weights = candidates[best, torch.arange(samples, device=labels.device)]
        weights = weights / weights.sum(dim=1, keepdim=True)
    return weights


def linear_target(logits: Tensor, labels: Tensor) -> Tensor:
    """Compute the best convex combination of the logits for each sample: (K, B, C) -> (B, C)."""
    return torch.einsum("kbc,bk->bc", logits, linear_weights(logits, labels))


def error_correlation(probabilities: Tensor, labels: Tensor) -> Tensor:
    """Compute C_ij, the mean over N samples of <p_i - y, p_j - y>: (K, N, C), (N,) -> (K, K)."""
    errors = probabilities - F.one_hot(labels, probabilities.shape[2])
    return torch.einsum("inc,jnc->ij", errors, errors) / len(labels)


def general_weights(correlation: Tensor) -> Tensor:
    """Weights w = C^-1 1 / (1' C^-1 1): (K, K) -> (K,)."""
    solved = torch.linalg.solve(correlation, correlation.new_ones(len(correlation)))
    return solved / solved.sum()


class KDCL(Method):
    """Online Knowledge Distillation via Collaborative Learning. Guo et al., CVPR 2020.

    Every network sees its own augmentation of the same images and learns from one target made of
    all networks' logits.

    Deviations: no code by the authors is public; the variants follow the paper's formulas. For
    `general`, samples are held out of the training set, once per run.
    """

    class Options(MethodOptions):
        variant: Literal["naive", "linear", "minlogit", "general"] = Field(
            default="minlogit", description="how the target is made"
        )
        temperature: float = Field(default=2.0, gt=0, description="softens both sides of KL")
        weight: float = Field(default=1.0, ge=0, description="weight of every KL term")
        held_out_share: float = Field(
            default=0.02, gt=0, lt=0.5, description="of the training set, for `general` only"
        )

    paper = "Online Knowledge Distillation via Collaborative Learning (KDCL). Guo et al., CVPR 2020"
    year = 2020
    views = VIEW_PER_NETWORK
    minimum_networks = 2
    ensemble_weights: Tensor

    def __init__(self, cohort: Cohort, options: Options):
        super().__init__(cohort, options)
        self.options = options
        self.networks = nn.ModuleList(cohort.build_all())
        self.register_buffer("ensemble_weights", torch.full((cohort.size,), 1 / cohort.size))
        if options.variant == "general":
            self.held_out_share = options.held_out_share
        targets: dict[str, Target] = {
            "naive": naive_target,
            "linear": linear_target,
            "minlogit": minlogit_target,
            "general": self._general_target,
        }
        self.target = targets[options.variant]

    def calibrate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        pairs = [(self._probabilities(images), labels) for images, labels in batches]
        probabilities = torch.cat([p for p, _ in pairs], dim=1).double()
        labels = torch.cat([labels for _, labels in pairs])
        self.ensemble_weights.copy_(general_weights(error_correlation(probabilities, labels)))

    def forward(self, views: Tensor, labels: Tensor) -> dict[str, Tensor]:
        pairs = zip(self.networks, views, strict=True)
        logits = [network(view).logits for network, view in pairs]
        with torch.no_grad():
            # In float64, which neither autocast nor a device's fast matrix mode shortens.
            target = self.target(torch.stack(logits).double(), labels).to(logits[0].dtype)
        terms = {}
        for role, z in network_roles(logits).items():
            terms[f"ce/{role}"] = F.cross_entropy(z, labels)
            terms[f"kl/{role}"] = self.options.weight * kl(target, z, self.options.temperature)
        return terms

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        return network_roles([network(images).logits for network in self.networks])

    def student(self) -> nn.Module:
        return self.networks[0]

    def _general_target(self, logits: Tensor, labels: Tensor) -> Tensor:
        return torch.einsum("k,kbc->bc", self.ensemble_weights.to(logits.dtype), logits)

    def _probabilities(self, images: Tensor) -> Tensor:
        return torch.stack([F.softmax(network(images).logits, dim=1) for network in self.networks])
