"""The contract of a method: one nn.Module that owns all networks of its cohort.

One module means one DDP wrapper, one compiled step and one checkpoint cover everything a method
trains. The harness decides data, order, schedule and evaluation; a method decides its losses,
its extra modules and how many views of an image it wants.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from kdbench.backbones import Backbone, build
from kdbench.seeds import seeded

VIEW_PER_NETWORK = 0


class MethodOptions(BaseModel):
    """Base of a method's options: typed, validated, paper values as defaults."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    networks: int | None = Field(
        None, ge=1, le=8, description="number of networks; the suite's by default"
    )


class ContractError(Exception):
    """A method that does not keep the contract; the message says what it did instead."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share an optimizer; None means what the suite says."""

    parameters: Iterable[nn.Parameter]
    optimizer: Literal["suite", "adam"] = "suite"
    learning_rate: float | None = None
    weight_decay: float | None = None


class Cohort:
    """The networks of one run. For one seed, network i starts from the same weights everywhere."""

    def __init__(self, architectures: Sequence[str], num_classes: int, seed: int, epochs: int):
        self.architectures = tuple(architectures)
        self.num_classes = num_classes
        self.epochs = epochs
        """Length of the schedule, for ramps that are a share of it."""
        self._seed = seed
        self._built = 0

    @property
    def size(self) -> int:
        """Number of networks K."""
        return len(self.architectures)

    def build(self) -> Backbone:
        """The next network of the cohort, freshly initialised; at most `size` of them."""
        index = self._built
        with seeded(self._seed, "weights", index):
            network = build(self.architectures[index], self.num_classes)
        self._built += 1
        return network

    def build_all(self) -> list[Backbone]:
        """All K networks, in order."""
        return [self.build() for _ in range(self.size)]


class Method(nn.Module, ABC):
    """Base class of all methods. Subclasses state `paper` and `year`, and say what deviates."""

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    paper: ClassVar[str] = ""
    """Title, authors, venue; for `kdbench list` and the tables."""
    year: ClassVar[int | None] = None
    views: ClassVar[int] = 1
    """V: independently augmented views of each image; VIEW_PER_NETWORK for as many as networks."""
    fixed_networks: ClassVar[int | None] = None
    """A number of networks that nothing changes; None takes the suite's."""
    minimum_networks: ClassVar[int] = 1
    equal_networks: ClassVar[bool] = False
    """Whether all networks must have one architecture. A method that takes mixed cohorts deploys
    the first network it builds, which is the one that the user named last."""
    attached_targets: ClassVar[bool] = False
    """Whether a network's loss may train other networks through its target, on purpose."""

    @abstractmethod
    def __init__(self, cohort: Cohort, options: MethodOptions):
        """Build the networks with `cohort.build()` and whatever else is trained."""
        super().__init__()

    @abstractmethod
    def forward(self, views: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Named scalar loss terms, already weighted; the harness minimises their sum.

        Args:
            views: (V, B, 3, H, W) normalised images; view 0 is the same for all methods.
            labels: (B,) class indices.
        """

    @abstractmethod
    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """Logits (B, C) by role for images (B, 3, H, W), in eval mode.

        `student` is what ships and always there. `peer<i>` are the other networks. Further roles
        ("fusion", "gate") are reported under their names. The harness adds "ensemble", the mean
        probability of the student and its peers, so that it means one thing everywhere.
        """

    @abstractmethod
    def student(self) -> nn.Module:
        """The network that ships, images -> Features, without anything used in training only."""

    def parameter_groups(self) -> list[ParameterGroup]:
        """All parameters under the suite's optimizer, unless a method says otherwise."""
        return [ParameterGroup(self.parameters())]

    held_out_share: float = 0.0
    """Share of the training images to hold out for `calibrate`; set it in the constructor."""

    def calibrate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Called before each epoch, in eval mode and without gradients, where images are held out.

        Args:
            batches: (B, 3, H, W) held-out training images, not augmented, and (B,) labels.
        """

    def begin_epoch(self, epoch: int) -> None:
        """Called before each epoch, counted from 0; put ramps into buffers, not Python floats.

        Called again before the rest of an epoch that a run was stopped in; buffers come back then.
        """


def share_trunk(networks: Sequence[Backbone]) -> None:
    """All networks use the first one's trunk and keep their own branches."""
    for network in networks[1:]:
        network.trunk = networks[0].trunk


def network_roles(logits: Sequence[Tensor], student: int = 0) -> dict[str, Tensor]:
    """Roles for K networks' logits: the student under its name, the others as peers in order."""
    peers = [z for index, z in enumerate(logits) if index != student]
    return {"student": logits[student], **{f"peer{i}": z for i, z in enumerate(peers)}}
