"""Collaborative Learning for Deep Neural Networks."""

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdbench.backbones import Backbone
from kdbench.losses import kl
from kdbench.method import Cohort, Method, MethodOptions, network_roles, share_trunk


class RescaledGradient(torch.autograd.Function):
    """Identity function whose gradient is divided by a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, divisor: int) -> Tensor:
        """Return `x` unchanged; any shape."""
        ctx.divisor = divisor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Return the gradient of `x`; the divisor has none."""
        return gradient / ctx.divisor, None


def consensus(logits: Sequence[Tensor]) -> list[Tensor]:
    """Compute for each of K heads the mean logits of the other heads, K tensors (B, C)."""
    total = torch.stack(list(logits)).sum(dim=0)
    return [(total - z) / (len(logits) - 1) for z in logits]


class CLILR(Method):
    """Collaborative Learning for Deep Neural Networks. Song & Chai, NeurIPS 2018,
    arXiv:1805.11761.

    K heads on one trunk; each learns from the labels and from the mean of the other heads'
    logits, L_h = beta CE(z_h, y) + (1 - beta) KL_T(sg mean_(j != h) z_j -> z_h). What all heads
    together send back into the trunk is divided by K.

    Deviations: the authors' code is not public, so public re-implementations decide the details.
    beta and T are those of qq456cvb/Collaborative-Learning. T^2 and KL in place of the
    cross-entropy to the soft target (the same gradient) are DefangChen/OKDDip's; the former has
    no T^2. Targets are detached; neither of the two detaches, and the former names that as its
    departure from the paper. OKDDip's own settings (no beta, T = 3, a ramp, 4 heads) are not
    used. All heads leave the trunk before the last stage; the paper also splits in several steps.
    """

    class Options(MethodOptions):
        temperature: float = Field(default=2.0, gt=0, description="softens both sides of KL")
        beta: float = Field(
            default=0.5, ge=0, le=1, description="weight of the labels; the consensus gets the rest"
        )

    paper = (
        "Collaborative Learning for Deep Neural Networks (CL-ILR). "
        "Song & Chai, NeurIPS 2018, arXiv:1805.11761"
    )
    year = 2018
    minimum_networks = 2
    equal_networks = True

    def __init__(self, cohort: Cohort, options: Options):
        super().__init__(cohort, options)
        self.temperature = options.temperature
        self.beta = options.beta
        networks = cohort.build_all()
        share_trunk(networks)
        self.networks = nn.ModuleList(networks)

    def forward(self, views: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self._logits(views[0])
        targets = network_roles([target.detach() for target in consensus(logits)])
        terms = {}
        for role, z in network_roles(logits).items():
            terms[f"ce/{role}"] = self.beta * F.cross_entropy(z, labels)
            terms[f"kl/{role}"] = (1 - self.beta) * kl(targets[role], z, self.temperature)
        return terms

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        return network_roles(self._logits(images))

    def student(self) -> nn.Module:
        return self.networks[0]

    def _logits(self, images: Tensor) -> list[Tensor]:
        networks = [cast(Backbone, network) for network in self.networks]
        trunk_map = networks[0].trunk(images)[-1]
        shared = RescaledGradient.apply(trunk_map, len(networks))
        return [network.branch(shared)[2] for network in networks]
