"""Knowledge Distillation by On-the-Fly Native Ensemble."""

from typing import cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdbench.backbones import Backbone
from kdbench.losses import kl, ramp
from kdbench.method import Cohort, Method, MethodOptions, network_roles, share_trunk

EPSILON = 1e-7
"""Constant that the authors' code adds to target probabilities."""


class Gate(nn.Module):
    """Gate that maps the trunk's map (B, c, h, w) to weights of K branches, (B, K)."""

    def __init__(self, channels: int, branches: int):
        super().__init__()
        self.linear = nn.Linear(channels, branches)
        self.bn = nn.BatchNorm1d(branches)

    def forward(self, trunk_map: Tensor) -> Tensor:
        pooled = trunk_map.mean(dim=(2, 3))
        return F.softmax(F.relu(self.bn(self.linear(pooled))), dim=1)


def gated_logits(gates: Tensor, logits: list[Tensor]) -> Tensor:
    """Compute the gated sum of K branches' logits, (B, C), from gates (B, K)."""
    return torch.einsum("bk,kbc->bc", gates, torch.stack(logits))


class ONE(Method):
    """Knowledge Distillation by On-the-Fly Native Ensemble. Lan et al., NeurIPS 2018,
    arXiv:1806.04606.

    K branches on one trunk; a gate mixes their logits into the teacher of all of them.

    Deviations: the ramp of 80 of 300 epochs scales with the suite's schedule.
    """

    class Options(MethodOptions):
        temperature: float = Field(default=3.0, gt=0, description="softens both sides of KL")
        ramp_share: float = Field(
            default=80 / 300, ge=0, le=1, description="share of the schedule that ramps KL up"
        )

    paper = (
        "Knowledge Distillation by On-the-Fly Native Ensemble (ONE). "
        "Lan et al., NeurIPS 2018, arXiv:1806.04606"
    )
    year = 2018
    minimum_networks = 2
    equal_networks = True
    ramp: Tensor

    def __init__(self, cohort: Cohort, options: Options):
        super().__init__(cohort, options)
        self.temperature = options.temperature
        self.ramp_epochs = options.ramp_share * cohort.epochs
        networks = cohort.build_all()
        share_trunk(networks)
        self.networks = nn.ModuleList(networks)
        self.gate = Gate(networks[0].channels[-2], cohort.size)
        self.register_buffer("ramp", torch.ones(()))

    def begin_epoch(self, epoch: int) -> None:
        self.ramp.fill_(ramp(epoch, self.ramp_epochs))

    def forward(self, views: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits, gated = self._logits(views[0])
        roles = network_roles(logits)
        terms = {f"ce/{role}": F.cross_entropy(z, labels) for role, z in roles.items()}
        terms["ce/gate"] = F.cross_entropy(gated, labels)
        target = gated.detach()
        for role, z in roles.items():
            terms[f"kl/{role}"] = self.ramp * kl(target, z, self.temperature, EPSILON)
        return terms

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        logits, gated = self._logits(images)
        return network_roles(logits) | {"gate": gated}

    def student(self) -> nn.Module:
        return self.networks[0]

    def _logits(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        networks = [cast(Backbone, network) for network in self.networks]
        trunk_map = networks[0].trunk(images)[-1]
        logits = [network.branch(trunk_map)[2] for network in networks]
        return logits, gated_logits(self.gate(trunk_map), logits)
