"""Online Knowledge Distillation with Diverse Peers."""

from typing import Literal, cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdbench.backbones import Backbone, Features
from kdbench.losses import kl, ramp
from kdbench.method import Cohort, Method, MethodOptions, network_roles, share_trunk

EPSILON = 1e-7
"""Constant that the authors' code adds to target probabilities."""


class PeerAttention(nn.Module):
    """Attention of each peer to all peers: maps embeddings (A, B, D) to weights (B, A, A)."""

    def __init__(self, width: int):
        super().__init__()
        self.query = nn.Linear(width, width // 8, bias=False)
        self.key = nn.Linear(width, width // 8, bias=False)

    def forward(self, embeddings: Tensor) -> Tensor:
        scores = torch.einsum("abd,cbd->bac", self.query(embeddings), self.key(embeddings))
        return F.softmax(scores, dim=2)


def mixed_targets(weights: Tensor, logits: Tensor) -> Tensor:
    """Compute the target of each peer, t_a = sum_b alpha_ab z_b: (A, B, C)."""
    return torch.einsum("bac,cbk->abk", weights, logits)


class OKDDip(Method):
    """Online Knowledge Distillation with Diverse Peers. Chen et al., AAAI 2020, arXiv:1912.00350.

    K - 1 peers learn from attention-weighted mixes of each other, a leader from their mean.
    Targets are not detached, as in the authors' code: the projections learn only through them.

    Deviations: the ramp of 80 of 300 epochs scales with the suite's schedule; the suite's weight
    decay (the paper's is 5e-4) and number of networks (the paper's is 4) hold.
    """

    class Options(MethodOptions):
        form: Literal["network", "branch"] = Field(
            default="network", description="whole networks, or branches on one trunk"
        )
        temperature: float = Field(default=3.0, gt=0, description="softens both sides of KL")
        ramp_share: float = Field(
            default=80 / 300, ge=0, le=1, description="share of the schedule that ramps KL up"
        )

    paper = (
        "Online Knowledge Distillation with Diverse Peers (OKDDip). "
        "Chen et al., AAAI 2020, arXiv:1912.00350"
    )
    year = 2020
    minimum_networks = 3
    equal_networks = True
    attached_targets = True
    ramp: Tensor

    def __init__(self, cohort: Cohort, options: Options):
        super().__init__(cohort, options)
        self.temperature = options.temperature
        self.ramp_epochs = options.ramp_share * cohort.epochs
        self.shared = options.form == "branch"
        networks = cohort.build_all()
        if self.shared:
            share_trunk(networks)
        self.networks = nn.ModuleList(networks)
        self.attention = PeerAttention(networks[0].width)
        self.register_buffer("ramp", torch.ones(()))

    def begin_epoch(self, epoch: int) -> None:
        self.ramp.fill_(ramp(epoch, self.ramp_epochs))

    def forward(self, views: Tensor, labels: Tensor) -> dict[str, Tensor]:
        *peers, leader = self._features(views[0])
        logits = torch.stack([features.logits for features in peers])
        weights = self.attention(torch.stack([features.embedding for features in peers]))
        targets = mixed_targets(weights, logits)
        terms = {}
        for i, (target, z) in enumerate(zip(targets, logits, strict=True)):
            terms[f"ce/peer{i}"] = F.cross_entropy(z, labels)
            terms[f"kl/peer{i}"] = self.ramp * kl(target, z, self.temperature, EPSILON)
        terms["ce/student"] = F.cross_entropy(leader.logits, labels)
        mean = logits.mean(dim=0)
        terms["kl/student"] = self.ramp * kl(mean, leader.logits, self.temperature, EPSILON)
        return terms

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        logits = [features.logits for features in self._features(images)]
        return network_roles(logits, student=len(logits) - 1)

    def student(self) -> nn.Module:
        return self.networks[-1]

    def _features(self, images: Tensor) -> list[Features]:
        networks = [cast(Backbone, network) for network in self.networks]
        if not self.shared:
            return [network(images) for network in networks]
        maps = networks[0].trunk(images)
        outputs = [network.branch(maps[-1]) for network in networks]
        return [Features((*maps, last), embedding, z) for last, embedding, z in outputs]
