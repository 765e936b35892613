"""One network trained with cross-entropy, the reference of all comparisons."""

import torch.nn.functional as F
from torch import Tensor, nn

from kdbench.method import Cohort, Method, MethodOptions


class Baseline(Method):
    """A single network trained with cross-entropy alone.

    Deviations: none.
    """

    paper = "Single network, cross-entropy"
    fixed_networks = 1

    def __init__(self, cohort: Cohort, options: MethodOptions):
        super().__init__(cohort, options)
        self.network = cohort.build()

    def forward(self, views: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"ce/student": F.cross_entropy(self.network(views[0]).logits, labels)}

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        return {"student": self.network(images).logits}

    def student(self) -> nn.Module:
        return self.network
