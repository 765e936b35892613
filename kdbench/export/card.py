"""What an exported file says of the network in it."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

import kdbench
from kdbench.export.student import Finished
from kdbench.results.schema import Identity, Metrics
from kdbench.suite.sections import Channels, Positive

Deviation = Annotated[float, Field(gt=0)]


class Card(BaseModel):
    """Travels within the file, as JSON under the key `kdbench`. Read from files of others."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    kdbench: str
    """Version that wrote the file."""
    architecture: str
    """Of the network in the file."""
    classes: Positive
    image_size: Positive
    """Side in pixels."""
    resize: Positive | None
    """Shorter side before the centre crop; None where images have the right size already."""
    mean: Channels
    std: Annotated[tuple[Deviation, Deviation, Deviation], Field(strict=False)]
    identity: Identity
    """Of the run; its architecture may mix several."""
    metrics: Metrics
    """Of the last epoch on the suite's test set."""
    precision: str
    """What the run was measured in; the file holds float32."""
    command: str
    """Trains the network."""


def card_of(finished: Finished) -> Card:
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
