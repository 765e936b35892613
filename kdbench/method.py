"""The contract of a method: one nn.Module that owns all networks of its cohort.

One DDP wrapper, one compiled step and one checkpoint therefore cover everything a method trains.
The harness decides data, order, schedule and evaluation. A method decides its losses, its extra
modules and the number of views of an image.
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
    """Base class of a method's options. Defaults are the values of the paper."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    networks: int | None = Field(
        None, ge=1, le=8, description="number of networks; the suite's by default"
    )


class ContractError(Exception):
    """Raised when a method violates the contract; the message says how."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with common optimizer settings; None means the suite's value."""

    parameters: Iterable[nn.Parameter]
    optimizer: Literal["suite", "adam"] = "suite"
    learning_rate: float | None = None
    weight_decay: float | None = None


class Cohort:
    """The networks of one run.

    For equal seeds, network i starts from the same weights in every method.
    """

    def __init__(self, architectures: Sequence[str], num_classes: int, seed: int, epochs: int):
        self.architectures = tuple(architectures)
        self.num_classes = num_classes
        self.epochs = epochs
        """Length of the schedule in epochs, for ramps that are a share of it."""
        self._seed = seed
        self._built = 0

    @property
    def size(self) -> int:
        """Number of networks K."""
        return len(self.architectures)

    def build(self) -> Backbone:
        """Build the next network of the cohort; call it at most `size` times."""
        index = self._built
        with seeded(self._seed, "weights", index):
            network = build(self.architectures[index], self.num_classes)
        self._built += 1
        return network

    def build_all(self) -> list[Backbone]:
        """Build all K networks, in order."""
        return [self.build() for _ in range(self.size)]


class Method(nn.Module, ABC):
    """Base class of all methods.

    Subclasses set `paper` and `year`, and list deviations from the paper in their docstring.
    """

    Options: ClassVar[type[MethodOptions]] = MethodOptions
    paper: ClassVar[str] = ""
    """Title, authors and venue, for `kdbench list` and tables."""
    year: ClassVar[int | None] = None
    views: ClassVar[int] = 1
    """Number V of independently augmented views of each image, or VIEW_PER_NETWORK."""
    fixed_networks: ClassVar[int | None] = None
    """Fixed number of networks; None means the suite's number."""
    minimum_networks: ClassVar[int] = 1
    equal_networks: ClassVar[bool] = False
    """True if all networks must have the same architecture. A method that supports mixed cohorts
    deploys the first network it builds, which is the one that the user named last."""
    attached_targets: ClassVar[bool] = False
    """True if a network's loss trains other networks through its target, on purpose."""

    @abstractmethod
    def __init__(self, cohort: Cohort, options: MethodOptions):
        """Build the networks with `cohort.build()`, and all other trained modules."""
        super().__init__()

    @abstractmethod
    def forward(self, views: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Compute the loss terms of a batch.

        Args:
            views: (V, B, 3, H, W) normalized images; view 0 is the same for all methods.
            labels: (B,) class indices.

        Returns:
            Weighted scalar loss terms named `kind/role`, whose sum the harness minimizes.
        """

    @abstractmethod
    def predict(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the logits of all roles, in eval mode.

        Role `student` is the deployed network and required. Roles `peer<i>` are the other networks.
        Further roles such as "fusion" and "gate" are reported under their names. The harness adds
        role "ensemble", the mean probability of the student and its peers.

        Args:
            images: (B, 3, H, W) normalized images.

        Returns:
            Logits (B, C) by role.
        """

    @abstractmethod
    def student(self) -> nn.Module:
        """Return the deployed network, which maps images to Features, without training modules."""

    def parameter_groups(self) -> list[ParameterGroup]:
        """Return the parameter groups; by default all parameters use the suite's optimizer."""
        return [ParameterGroup(self.parameters())]

    held_out_share: float = 0.0
    """Share of the training images held out for `calibrate`; set it in the constructor."""

    def calibrate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Called before each epoch if images are held out, in eval mode and without gradients.

        Args:
            batches: held-out images (B, 3, H, W), not augmented, and labels (B,).
        """

    def begin_epoch(self, epoch: int) -> None:
        """Called before each epoch, and again when a run resumes within an epoch.

        Store ramps in buffers instead of Python floats, which would retrigger compilation. Buffers
        are restored when a run resumes.

        Args:
            epoch: number of the epoch, counted from 0.
        """


def share_trunk(networks: Sequence[Backbone]) -> None:
    """Make all networks use the trunk of the first; they keep their own branches."""
    for network in networks[1:]:
        network.trunk = networks[0].trunk


def network_roles(logits: Sequence[Tensor], student: int = 0) -> dict[str, Tensor]:
    """Return the logits of K networks by role: the student, and the others as peers in order."""
    peers = [z for index, z in enumerate(logits) if index != student]
    return {"student": logits[student], **{f"peer{i}": z for i, z in enumerate(peers)}}
