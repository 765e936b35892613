"""One network with smoothed labels, a control that many gains of distillation do not exceed."""

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdbench.method import Cohort, Method, MethodOptions


class LabelSmoothing(Method):
    """Rethinking the Inception Architecture for Computer Vision. Szegedy et al., CVPR 2016,
    arXiv:1512.00567.

    A single network, cross-entropy against labels mixed with the uniform distribution.

    Deviations: none.
    """

    class Options(MethodOptions):
        smoothing: float = Field(
            default=0.1, ge=0, lt=1, description="weight of the uniform distribution"
        )

    paper = (
        "Rethinking the Inception Architecture for Computer Vision (label smoothing). "
        "Szegedy et al., CVPR 2016, arXiv:1512.00567"
    )
    year = 2016
    fixed_networks = 1

    def __init__(self, cohort: Cohort, options: Options):
        super().__init__(cohort, options)
        self.smoothing = options.smoothing
        self.network = cohort.build()

    def forward(self, views: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.network(views[0]).logits
        return {"ce/student": F.cross_entropy(logits, labels, label_smoothing=self.smoothing)}

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        return {"student": self.network(images).logits}

    def student(self) -> nn.Module:
        return self.network
