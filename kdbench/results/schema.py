"""The schema of a result: everything that one run measured, and what made it."""

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, Self

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from kdbench.validation import FolderName

SCHEMA_VERSION: Final = 1
"""Version of the schema that this kdbench writes."""

Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**63)]

Arithmetic = Literal["fp32", "tf32", "bf16"]
"""Arithmetic of matrix products."""

Status = Literal["finished", "diverged", "failed"]
"""Outcome of a run."""


class Record(BaseModel):
    """Base class of immutable records that reject unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Identity(Record):
    """Identity of a run: suite, architecture, method and seed."""

    suite: FolderName
    suite_hash: str
    architecture: FolderName
    method: FolderName
    """Name of the method, with the options that differ from its defaults."""
    method_hash: str
    """Hash of the method's source, without comments and docstrings."""
    seed: Count


class Metrics(Record):
    """Metrics of one role on the evaluation set."""

    top1: Percent
    """Top-1 accuracy in percent."""
    top5: Percent
    """Top-5 accuracy in percent."""
    loss: float
    """Mean cross-entropy, which is the negative log-likelihood."""
    ece: Percent | None = None
    """Expected calibration error in percent: the mean distance between confidence and accuracy over
    15 equal bins of confidence (Guo et al., ICML 2017). None in results of earlier versions."""
    brier: float | None = None
    """Brier score: the mean squared distance between probabilities and one-hot labels, from 0 to 2
    (Brier, 1950). None in results of earlier versions."""
    disagreement: Percent | None = None
    """Share of the images on which two networks predict different classes, in percent, as a mean
    over pairs of networks. Role "mean" only."""

    @model_serializer(mode="wrap")
    def _without_unknown(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {name: value for name, value in serialize(self).items() if value is not None}


class Epoch(Record):
    """One epoch of training and the evaluation after it."""

    epoch: int
    """Number of the epoch, counted from 1."""
    learning_rate: float
    """Suite's learning rate in the last step of the epoch."""
    losses: dict[str, float]
    """Mean of each weighted loss term over the steps of the epoch."""
    metrics: dict[str, Metrics]
    """Metrics by role. Role "ensemble" is the mean probability of the networks, role "mean" the
    mean of their metrics. Empty if the epoch was not evaluated."""


class BestOnTest(Record):
    """Epoch with the best student on the test set. It is optimistic and never the headline."""

    epoch: int
    metrics: dict[str, Metrics]


class Cost(Record):
    """Cost of a run. Rates exclude warm-up and evaluation."""

    images_per_second: Amount | None
    """Median over windows of training steps; None if the run was too short to measure."""
    step_milliseconds: Amount | None
    """Median time of a step over the same windows."""
    training_seconds: Amount
    evaluation_seconds: Amount
    peak_memory_bytes: Count
    jobs: Count = 1
    """Number of runs that shared the device, including this one. Above 1, rates are not
    meaningful."""
    waiting_share: Amount | None = None
    """Share of training time spent waiting for data, an upper bound on a GPU; None if all images
    are in memory."""
    peak_memory_kind: Literal["device", "process"]
    """Kind of peak memory: "device" is memory allocated on the GPU, "process" is resident memory
    including images. With several processes it is the largest."""
    parameters_trained: Count
    parameters_deployed: Count
    student_forward_flops: Count
    """FLOPs of one image through the deployed student, counting 2 per multiply-add."""
    training_flops: Annotated[int, Field(ge=0, lt=10**30)] | None = None
    """FLOPs of all training steps (forward and backward passes of all networks on all views,
    counting 2 per multiply-add); None in results of earlier versions."""


class Environment(Record):
    """Everything that could explain a difference; no host name, user name or path."""

    kdbench: str
    commit: str | None
    dirty: bool | None
    python: str
    torch: str
    accelerate: str
    system: str
    device: str
    threads: int
    processes: Count
    """Number of processes that trained the run together; rates are totals over all of them."""
    precision: Arithmetic = "fp32"
    deterministic: bool = False
    """True if nondeterministic operations were forbidden. A CPU has none."""
    step: str = "eager"
    """Mode of training steps: eager, compiled by inductor, replayed as a CUDA graph, or both."""
    command: str
    """Command that reproduces this run, given the data."""


TRAINED_BEFORE = "trained before on"
"""Key of the note that lists earlier hardware of a run, and the step at which the run left it."""


class Result(Record):
    """Result of one run."""

    schema_version: Literal[1] = SCHEMA_VERSION
    fingerprint: str
    """Hash of suite, method, options, architecture and seed, which is equal for equal runs."""
    harness: int = 1
    """Version of the harness; other versions give other numbers."""
    identity: Identity
    options: dict[str, Any]
    protocol: dict[str, Any]
    """The complete suite."""
    status: Status
    reason: str | None = None
    """Reason why the run did not finish."""
    last: dict[str, Metrics] | None
    """Metrics of the last epoch by role, which are the headline."""
    best_on_test: BestOnTest | None
    history: list[Epoch]
    """Epochs that were evaluated."""
    cost: Cost | None
    environment: Environment
    data: str | None = None
    """Hash of training and test images and their labels; None in results of earlier versions."""
    notes: dict[str, Any] = Field(default_factory=dict)
    """Further facts about the run, by title."""

    @property
    def is_alone(self) -> bool:
        """True if rate, time and memory were measured on one device that no other run shared."""
        shared = self.cost is None or self.cost.jobs > 1
        return not shared and TRAINED_BEFORE not in self.notes

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.status == "finished" and (self.cost is None or "student" not in (self.last or {})):
            raise ValueError("a finished run has a cost and a student in 'last'")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """Check that redundant fields agree, so that no single number can be changed."""
        if [epoch.epoch for epoch in self.history] != self._evaluated_epochs():
            raise ValueError("the epochs of 'history' are not those that the suite evaluates")
        if self.status != "finished":
            return self
        if not all("student" in epoch.metrics for epoch in self.history):
            raise ValueError("an epoch of 'history' has no student")
        if not self.history or self.last != self.history[-1].metrics:
            raise ValueError("'last' differs from the last epoch of 'history'")
        if self.best_on_test != best_on_test(self.history):
            raise ValueError("'best_on_test' is not the epoch of 'history' with the best student")
        return self

    def _evaluated_epochs(self) -> list[int]:
        """Return the epochs that the suite evaluates, up to the last one of the history."""
        every = self.protocol.get("evaluate_every", 1)
        last = self.history[-1].epoch if self.history else 0
        return [*range(every, last, every), last] if last else []


def best_on_test(history: Sequence[Epoch]) -> BestOnTest | None:
    """Return the first epoch with the best student; None if there is no epoch."""
    best = max(history, key=lambda epoch: epoch.metrics["student"].top1, default=None)
    return None if best is None else BestOnTest(epoch=best.epoch, metrics=best.metrics)
