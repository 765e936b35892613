"""Mutual Contrastive Learning for Visual Representation Learning."""

from typing import cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdbench.backbones import Features
from kdbench.losses import kl
from kdbench.method import Cohort, Method, MethodOptions, network_roles


class Projection(nn.Module):
    """Projection of embeddings (B, D) to unit vectors (B, E), used in training only."""

    def __init__(self, width: int, size: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(width, size), nn.ReLU(), nn.Linear(size, size))

    def forward(self, embedding: Tensor) -> Tensor:
        return F.normalize(self.layers(embedding), dim=1)


def contrastive_loss(similarity: Tensor, labels: Tensor) -> Tensor:
    """Compute the supervised contrastive loss of B anchors against B samples, without the anchor.

    Args:
        similarity: (B, B), anchors by samples, divided by the temperature.
        labels: (B,); samples of the anchor's class are its positives.

    Anchors without a positive in the batch count for nothing.
    """
    own = torch.eye(len(labels), dtype=torch.bool, device=labels.device)
    positive = (labels[:, None] == labels[None, :]) & ~own
    others = similarity.masked_fill(own, -torch.inf)
    log_p = similarity - others.logsumexp(dim=1, keepdim=True)
    positives = positive.sum(dim=1)
    of_anchor = (log_p * positive).sum(dim=1) / positives.clamp_min(1)
    return -of_anchor.sum() / (positives > 0).sum().clamp_min(1)


class MCL(Method):
    """Mutual Contrastive Learning for Visual Representation Learning. Yang et al., AAAI 2022,
    arXiv:2104.12565.

    Networks project their embeddings to unit vectors e. With S_ij = e_i e_j' / tau, network i
    minimises CE, the contrastive losses of S_ii (VCL) and of all S_ij (ICL), and the divergences
    of its similarities from its peers': KL_T(sg S_jj -> S_ii) and KL_T(sg S_ji -> S_ij), summed
    over j != i. ICL trains both networks of a pair.

    Deviations: the supervised loss of the authors' CIFAR code (winycg/MCL). Its sampler puts two
    images of each class into a batch; the suite decides the batches here, so anchors without a
    positive are left out of the means. The combination with logit distillation, off by default
    there, is left out. The network that ships is the first; the code reports the best one. With
    several processes each contrasts the images of its own share of the batch.
    """

    class Options(MethodOptions):
        vcl_weight: float = Field(default=0.1, ge=0, description="weight of VCL")
        icl_weight: float = Field(default=0.1, ge=0, description="weight of ICL")
        soft_vcl_weight: float = Field(default=1.0, ge=0, description="weight of soft VCL")
        soft_icl_weight: float = Field(default=1.0, ge=0, description="weight of soft ICL")
        contrast_temperature: float = Field(
            default=0.07, gt=0, description="tau, divides the cosine similarities"
        )
        temperature: float = Field(default=3.0, gt=0, description="softens both sides of KL")
        size: int = Field(default=128, ge=1, description="length of the projected embeddings")

    paper = (
        "Mutual Contrastive Learning for Visual Representation Learning (MCL). "
        "Yang et al., AAAI 2022, arXiv:2104.12565"
    )
    year = 2022
    minimum_networks = 2
    attached_targets = True

    def __init__(self, cohort: Cohort, options: Options):
        super().__init__(cohort, options)
        self.options = options
        networks = cohort.build_all()
        self.networks = nn.ModuleList(networks)
        heads = [Projection(network.width, options.size) for network in networks]
        self.projections = nn.ModuleList(heads)

    def forward(self, views: Tensor, labels: Tensor) -> dict[str, Tensor]:
        features = [cast(Features, network(views[0])) for network in self.networks]
        pairs = zip(self.projections, features, strict=True)
        units = [projection(f.embedding) for projection, f in pairs]
        ce = [F.cross_entropy(f.logits, labels) for f in features]
        terms = {f"ce/{role}": loss for role, loss in network_roles(ce).items()}
        for kind, losses in self._contrast(units, labels).items():
            terms |= {f"{kind}/{role}": loss for role, loss in network_roles(losses).items()}
        return terms

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        return network_roles([network(images).logits for network in self.networks])

    def student(self) -> nn.Module:
        return self.networks[0]

    def _contrast(self, units: list[Tensor], labels: Tensor) -> dict[str, list[Tensor]]:
        """Compute the four weighted losses of each network from K unit embeddings (B, E)."""
        o, count = self.options, len(units)
        s = [[a @ b.T / o.contrast_temperature for b in units] for a in units]
        own = [contrastive_loss(s[i][i], labels) for i in range(count)]
        across, soft_own, soft_across = [], [], []
        for i in range(count):
            peers = [j for j in range(count) if j != i]
            across.append(sum_of([contrastive_loss(s[i][j], labels) for j in peers]))
            soft_own.append(sum_of([kl(s[j][j].detach(), s[i][i], o.temperature) for j in peers]))
            soft = [kl(s[j][i].detach(), s[i][j], o.temperature) for j in peers]
            soft_across.append(sum_of(soft))
        return {
            "vcl": [o.vcl_weight * loss for loss in own],
            "icl": [o.icl_weight * loss for loss in across],
            "soft_vcl": [o.soft_vcl_weight * loss for loss in soft_own],
            "soft_icl": [o.soft_icl_weight * loss for loss in soft_across],
        }


def sum_of(losses: list[Tensor]) -> Tensor:
    """Sum a list of scalars."""
    return torch.stack(losses).sum()
