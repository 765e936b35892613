"""Metadata that an exported file carries about its network."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

import kdbench
from kdbench.export.student import FinishedRun
from kdbench.results.schema import Identity, Metrics
from kdbench.suite.sections import Channels, Positive

Deviation = Annotated[float, Field(gt=0)]


class Card(BaseModel):
    """Metadata stored within an exported file, as JSON under the key `kdbench`.

    Files may come from anyone, so the metadata is validated strictly.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    kdbench: str
    """Version of kdbench that wrote the file."""
    architecture: str
    """Architecture of the network in the file."""
    classes: Positive
    image_size: Positive
    """Side of the images in pixels."""
    resize: Positive | None
    """Shorter side before the center crop; None if images already have the right size."""
    mean: Channels
    std: Annotated[tuple[Deviation, Deviation, Deviation], Field(strict=False)]
    identity: Identity
    """Identity of the run; its architecture may mix several."""
    metrics: Metrics
    """Metrics of the last epoch on the suite's test set."""
    precision: str
    """Precision in which the run was evaluated; the file holds float32."""
    command: str
    """Command that trains the network."""


def make_card(finished: FinishedRun) -> Card:
    """Return the metadata for the network of a finished run."""
    result, suite = finished.result, finished.spec.suite
    assert result.last is not None
    return Card(
        kdbench=kdbench.__version__,
        architecture=result.identity.architecture.rpartition("+")[2],
        classes=suite.data.classes,
        image_size=suite.data.image_size,
        resize=suite.data.resize,
        mean=suite.augmentation.mean,
        std=suite.augmentation.std,
        identity=result.identity,
        metrics=result.last["student"],
        precision=result.environment.precision,
        command=result.environment.command,
    )
