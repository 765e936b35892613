"""K networks that share no knowledge, the control with the cost of K networks."""

import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.method import Cohort, Method, MethodOptions, network_roles


class Independent(Method):
    """K networks, each trained with cross-entropy alone; network 0 is deployed.

    Its student starts as `baseline`'s does and sees the same images, so the two agree; what it
    adds is the cohort's mean and the ensemble that the distillation methods must beat.

    Deviations: none.
    """

    paper = "K networks trained independently"
    minimum_networks = 2

    def __init__(self, cohort: Cohort, options: MethodOptions):
        super().__init__(cohort, options)
        self.networks = nn.ModuleList(cohort.build_all())

    def forward(self, views: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = [network(views[0]).logits for network in self.networks]
        roles = network_roles(logits)
        return {f"ce/{role}": F.cross_entropy(z, labels) for role, z in roles.items()}

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        return network_roles([network(images).logits for network in self.networks])

    def student(self) -> nn.Module:
        return self.networks[0]
