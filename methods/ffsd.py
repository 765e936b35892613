"""Feature Fusion and Self-Distillation."""

from collections.abc import Sequence
from itertools import pairwise
from typing import cast

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from kdbench.backbones import Features, initialise
from kdbench.losses import attention, kl, mutual_kl, normalised_distance, ramp
from kdbench.method import Cohort, Method, MethodOptions, ParameterGroup, network_roles


def shifted_attention(attention_map: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the attention that a peer should move to.

    The weakest third stays weak, the rest is mirrored.

    Args:
        attention_map: (B, 1, h, w).

    Returns:
        The normalized map u and its shifted form v, both (B, h*w), and the norm n (B, 1) with
        u = a / n.
    """
    flat = attention_map.flatten(1)
    norm = flat.norm(dim=1, keepdim=True)
    unit = flat / norm
    rank = max(flat.shape[1] // 3, 1)
    threshold = unit.sort(dim=1).values[:, rank - 1, None]
    half = norm / 2
    return unit, (half - unit) * torch.sign(unit - threshold) + half, norm


def diversity(features: Tensor, previous: Tensor) -> Tensor:
    """Compute the distance of a student's attention from its predecessor's shifted attention."""
    target = shifted_attention(attention(previous.detach()))[1]
    return F.mse_loss(F.normalize(attention(features).flatten(1), dim=1), target)


def shift(features: Tensor) -> Tensor:
    """Shift the attention of a map (B, c, h, w), spreading the difference over its channels."""
    unit, shifted, norm = shifted_attention(attention(features))
    height, width = features.shape[2:]
    difference = (shifted - unit) * norm / features.shape[1]
    return features + difference.unflatten(1, (1, height, width))


def attention_distance(x: Tensor, y: Tensor) -> Tensor:
    """Compute the normalized distance of the attention maps of two feature maps."""
    return normalised_distance(attention(x), attention(y))


class Remix(nn.Sequential):
    """Fusion and transfer module: depthwise 3x3, BN, ReLU, 1x1 to other channels, BN, ReLU."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(
            nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False),
            nn.BatchNorm2d(inputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )


class Fusion(nn.Module):
    """Fusion of the concatenated last stages of m students to one map and its logits."""

    def __init__(self, students: int, channels: int, num_classes: int):
        super().__init__()
        self.remix = Remix(students * channels, channels)
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, maps: Tensor) -> tuple[Tensor, Tensor]:
        fused = self.remix(maps)
        return fused, self.classifier(fused.mean(dim=(2, 3)))


class Rebuild(nn.Module):
    """Block of a self-distillation module that doubles the size and sets the channels."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.conv = nn.ConvTranspose2d(
            inputs, outputs, 3, stride=2, padding=1, output_padding=1, bias=False
        )
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor, as_target: bool) -> Tensor:
        # The mode is an argument, because switching train() within a step breaks compiled graphs.
        y = F.batch_norm(
            self.conv(x),
            self.bn.running_mean,
            self.bn.running_var,
            self.bn.weight,
            self.bn.bias,
            training=self.training and not as_target,
            momentum=self.bn.momentum or 0.0,
            eps=self.bn.eps,
        )
        return F.relu(y, inplace=True)


class SelfDistillation(nn.Module):
    """Module that rebuilds the shallower stages of a network from its last one, deepest first."""

    def __init__(self, channels: Sequence[int]):
        super().__init__()
        pairs = pairwise(reversed(channels))
        self.blocks = nn.ModuleList(Rebuild(deep, shallow) for deep, shallow in pairs)

    def forward(self, last: Tensor, as_target: bool) -> list[Tensor]:
        """Return all shallower stages, shallowest first; targets use running statistics."""
        maps = [last]
        for block in self.blocks:
            maps.append(block(maps[-1], as_target))
        return maps[:0:-1]

    def target(self, last: Tensor) -> list[Tensor]:
        with torch.no_grad():
            return self(last, as_target=True)

    def reconstruction(self, features: Features) -> Tensor:
        """Compute the module's own loss on the detached maps of its network."""
        stages = [stage.detach() for stage in features.stages]
        rebuilt = self(stages[-1], as_target=False)
        return torch.stack(
            [
                normalised_distance(ours, theirs) + attention_distance(ours, theirs)
                for ours, theirs in zip(rebuilt, stages[:-1], strict=True)
            ]
        ).sum()


def imitate(features: Features, targets: Sequence[Tensor]) -> Tensor:
    """Sum the attention distances between the shallower stages and the rebuilt ones."""
    distances = [
        attention_distance(stage, target)
        for stage, target in zip(features.stages[:-1], targets, strict=True)
    ]
    return torch.stack(distances).sum()


class FFSD(Method):
    """Distilling a Powerful Student Model via Online Knowledge Distillation. Li et al.,
    TNNLS 2022, arXiv:2103.14473.

    K - 1 common students, a fusion of their last stages, and a leader that learns from the fusion
    and is deployed alone.

    Deviations from the authors' code: all losses are back-propagated once (the gradients are the
    same, since targets are detached); every epoch of the schedule is trained (their loop skips
    the last); the ensemble is the mean probability (theirs counts any student that is right).
    """

    class Options(MethodOptions):
        temperature: float = Field(2.0, gt=0, description="softens both sides of every KL term")
        diversity_weight: float = Field(1e-5, ge=0, description="diversity of the students")
        fusion_weight: float = Field(10.0, ge=0, description="attention distances of the leader")
        reconstruction_weight: float = Field(1000.0, ge=0, description="self-distillation modules")
        warmup_epochs: int = Field(5, ge=0, description="ramp of the three weights above")
        fusion_weight_decay: float = Field(1e-5, ge=0, description="of the fusion module")
        adam_learning_rate: float = Field(1e-3, gt=0, description="of self-distillation modules")

    paper = (
        "Distilling a Powerful Student Model via Online Knowledge Distillation (FFSD). "
        "Li et al., TNNLS 2022, arXiv:2103.14473"
    )
    year = 2022
    minimum_networks = 3
    equal_networks = True
    ramp: Tensor

    def __init__(self, cohort: Cohort, options: Options):
        super().__init__(cohort, options)
        self.options = options
        *students, leader = cohort.build_all()
        self.students = nn.ModuleList(students)
        self.leader = leader
        channels = leader.channels
        width = channels[-1]
        self.transfer = Remix(width, len(students) * width).apply(initialise)
        self.fusion = Fusion(len(students), width, cohort.num_classes).apply(initialise)
        self.student_distillers = nn.ModuleList(
            SelfDistillation(channels).apply(initialise) for _ in students[1:]
        )
        self.leader_distiller = SelfDistillation(channels).apply(initialise)
        self.register_buffer("ramp", torch.ones(()))

    def begin_epoch(self, epoch: int) -> None:
        self.ramp.fill_(ramp(epoch + 1, self.options.warmup_epochs))

    def forward(self, views: Tensor, labels: Tensor) -> dict[str, Tensor]:
        students = [student(views[0]) for student in self.students]
        leader = self.leader(views[0])
        lasts = [features.stages[-1].detach() for features in students]
        concatenated = torch.cat(lasts, dim=1)
        fused, fused_logits = self.fusion(concatenated)
        terms = self._student_terms(students, labels)
        mean_logits = torch.stack([f.logits.detach() for f in students]).mean(dim=0)
        terms["ce/fusion"] = F.cross_entropy(fused_logits, labels)
        terms["kl/fusion"] = kl(mean_logits, fused_logits, self.options.temperature)
        return terms | self._leader_terms(
            leader, fused.detach(), fused_logits.detach(), concatenated, labels
        )

    def _student_terms(self, students: list[Features], labels: Tensor) -> dict[str, Tensor]:
        weight = self.options.diversity_weight * self.ramp
        divergences = mutual_kl([f.logits for f in students], self.options.temperature)
        terms = {}
        for i, features in enumerate(students):
            terms[f"ce/peer{i}"] = F.cross_entropy(features.logits, labels)
            terms[f"kl/peer{i}"] = divergences[i]
            if i == 0:
                continue
            previous = students[i - 1].stages[-1].detach()
            distiller = cast(SelfDistillation, self.student_distillers[i - 1])
            # Compute the target first, so that it uses the statistics before this step's update.
            targets = distiller.target(shift(previous))
            terms[f"diversity/peer{i}"] = weight * diversity(features.stages[-1], previous)
            terms[f"self_distillation/peer{i}"] = weight * imitate(features, targets)
            terms[f"reconstruction/peer{i}"] = self._reconstruction(distiller, features)
        return terms

    def _leader_terms(
        self, leader: Features, fused: Tensor, fused_logits: Tensor, peers: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        weight = self.options.fusion_weight * self.ramp
        last = leader.stages[-1]
        targets = self.leader_distiller.target(fused)
        return {
            "ce/student": F.cross_entropy(leader.logits, labels),
            "kl/student": kl(fused_logits, leader.logits, self.options.temperature),
            "fused_attention/student": weight * attention_distance(last, fused),
            "transferred_attention/student": weight
            * attention_distance(self.transfer(last), peers),
            "self_distillation/student": weight * imitate(leader, targets),
            "reconstruction/student": self._reconstruction(self.leader_distiller, leader),
        }

    def _reconstruction(self, distiller: SelfDistillation, features: Features) -> Tensor:
        weight = self.options.reconstruction_weight * self.ramp
        return weight * distiller.reconstruction(features)

    def predict(self, images: Tensor) -> dict[str, Tensor]:
        students = [student(images) for student in self.students]
        lasts = torch.cat([features.stages[-1] for features in students], dim=1)
        logits = [features.logits for features in students] + [self.leader(images).logits]
        return network_roles(logits, student=len(students)) | {"fusion": self.fusion(lasts)[1]}

    def student(self) -> nn.Module:
        return self.leader

    def parameter_groups(self) -> list[ParameterGroup]:
        networks = nn.ModuleList([self.students, self.leader, self.transfer])
        distillers = nn.ModuleList([self.student_distillers, self.leader_distiller])
        return [
            ParameterGroup(networks.parameters()),
            ParameterGroup(self.fusion.parameters(), weight_decay=self.options.fusion_weight_decay),
            ParameterGroup(
                distillers.parameters(), "adam", learning_rate=self.options.adam_learning_rate
            ),
        ]
