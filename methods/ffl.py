"""Feature Fusion for Online Mutual Knowledge Distillation."""

from typing import cast

import torch
import torch.nn.functional as F
from kdbench.methods.ffsd import Fusion
from pydantic import Field
from torch import Tensor, nn

from kdbench.backbones import Backbone, initialise
from kdbench.losses import kl, ramp
from kdbench.method import (
    Cohort,
    Method,
    MethodOptions,
    ParameterGroup,
    network_roles,
    share_trunk,
)

EPSILON = 1e-7
"""Constant that the authors' code adds to target probabilities."""


class FFL(Method):
    """Feature Fusion for Online Mutual Knowledge Distillation. Kim et al., ICPR 2020,
    arXiv:1904.09058.

    Two branches share a trunk. A fusion module, the one that FFSD adopted, classifies their
    concatenated last stages. The branches learn from the fused logits, and the fusion module learns
    from the mean of the branches' logits.

    Deviations: the ramp of 80 of 300 epochs scales with the suite's schedule; every epoch of the
    schedule is trained once (the authors' loop runs one more); the authors name no network to
    deploy, and kdbench deploys the trunk with the first branch.
    """

    class Options(MethodOptions):
        networks: int | None = Field(2, ge=2, le=8, description="number of branches")
        temperature: float = Field(3.0, gt=0, description="temperature of every KL term")
        ramp_share: float = Field(
            80 / 300, ge=0, le=1, description="share of the schedule over which KL ramps up"
        )
        fusion_weight_decay: float = Field(
            1e-5, ge=0, description="weight decay of the fusion module"
        )

    paper = (
        "Feature Fusion for Online Mutual Knowledge Distillation (FFL). "
        "Kim et al., ICPR 2020, arXiv:1904.09058"
    )
    year = 2020
    minimum_networks = 2
    equal_networks = True
    ramp: Tensor

    def __init__(self, cohort: Cohort, options: Options):
        super().__init__(cohort, options)
        self.options = options
        self.ramp_epochs = options.ramp_share * cohort.epochs
        networks = cohort.build_all()
        share_trunk(networks)
        self.networks = nn.ModuleList(networks)
        channels = networks[0].channels[-1]
        self.fusion = Fusion(cohort.size, channels, cohort.num_classes).apply(initialise)
        self.register_buffer("ramp", torch.ones(()))

    def begin_epoch(self, epoch: int) -> None:
        self.ramp.fill_(ramp(epoch, self.ramp_epochs))

    def forward(self, views: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits, fused = self._logits(views[0])
        roles = network_roles(logits)
        temperature = self.options.temperature
        terms = {f"ce/{role}": F.cross_entropy(z, labels) for role, z in roles.items()}
        terms["ce/fusion"] = F.cross_entropy(fused, labels)
        target = fused.detach()
        for role, z in roles.items():
            terms[f"kl/{role}"] = self.ramp * kl(target, z, temperature, EPSILON)
        mean = torch.stack(logits).mean(dim=0).detach()
        terms["kl/fusion"] = self.ramp * kl(mean, fused, temperature, EPSILON)
        return terms

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        logits, fused = self._logits(images)
        return network_roles(logits) | {"fusion": fused}

    def student(self) -> nn.Module:
        return self.networks[0]

    def parameter_groups(self) -> list[ParameterGroup]:
        return [
            ParameterGroup(self.networks.parameters()),
            ParameterGroup(self.fusion.parameters(), weight_decay=self.options.fusion_weight_decay),
        ]

    def _logits(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the branches' logits, each (B, C), and the fused logits (B, C)."""
        networks = [cast(Backbone, network) for network in self.networks]
        trunk_map = networks[0].trunk(images)[-1]
        outputs = [network.branch(trunk_map) for network in networks]
        # The maps stay attached: the fused losses train the branches and the trunk as well.
        fused = self.fusion(torch.cat([last for last, _, _ in outputs], dim=1))[1]
        return [logits for _, _, logits in outputs], fused
