"""The interface of architectures: stages, embedding, logits, and a split into trunk and branch."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor, nn


class Features(NamedTuple):
    """Outputs of a backbone for a batch of B images."""

    stages: tuple[Tensor, ...]
    """One feature map (B, c_l, h_l, w_l) per stage."""
    embedding: Tensor
    """Pooled last stage, (B, D)."""
    logits: Tensor
    """Logits, (B, C)."""


class Trunk(nn.Module):
    """Stem and all stages except the last. Maps images (B, 3, H, W) to one map per stage."""

    def __init__(self, stem: nn.Module, stages: Sequence[nn.Module]):
        super().__init__()
        self.stem = stem
        self.stages = nn.ModuleList(stages)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        maps = [self.stem(images)]
        for stage in self.stages:
            maps.append(stage(maps[-1]))
        return tuple(maps[1:])


class Branch(nn.Module):
    """Last stage, global average pooling, dropout and classifier."""

    def __init__(self, stage: nn.Module, classifier: nn.Linear, dropout: float = 0.0):
        super().__init__()
        self.stage = stage
        self.dropout = nn.Dropout(dropout)
        self.classifier = classifier

    def forward(self, trunk_map: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Map (B, c, h, w) to the last feature map, the embedding (B, D) and the logits (B, C)."""
        last = self.stage(trunk_map)
        embedding = last.mean(dim=(2, 3))
        return last, embedding, self.classifier(self.dropout(embedding))


class Backbone(nn.Module):
    """A classifier that consists of trunk and branch; `channels` are those of its stages."""

    def __init__(self, trunk: Trunk, branch: Branch, channels: tuple[int, ...]):
        super().__init__()
        self.trunk = trunk
        self.branch = branch
        self.channels = channels
        self.apply(initialise)

    @property
    def width(self) -> int:
        """Width D of the embedding."""
        return self.branch.classifier.in_features

    def forward(self, images: Tensor) -> Features:
        maps = self.trunk(images)
        last, embedding, logits = self.branch(maps[-1])
        return Features((*maps, last), embedding, logits)


def initialise(module: nn.Module) -> None:
    """Initialize convolutions from N(0, 2 / (k * k * out)) and BN with 1 and 0.

    Biases of convolutions are zero, and linear layers keep PyTorch's initialization.
    """
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        fan_out = math.prod(module.kernel_size) * module.out_channels
        nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.ones_(module.weight)
        nn.init.zeros_(module.bias)
