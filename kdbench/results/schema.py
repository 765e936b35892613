"""The schema of a result: everything that one run measured, and what made it."""

from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from kdbench.validation import FolderName

SCHEMA_VERSION: Final = 1

Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
Amount = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, lt=2**63)]

Arithmetic = Literal["fp32", "tf32", "bf16"]
"""What matrices were multiplied in."""

Status = Literal["finished", "diverged", "failed"]


class Record(BaseModel):
    """Written once, read strictly."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Identity(Record):
    """What was run."""

    suite: FolderName
    suite_hash: str
    architecture: FolderName
    method: FolderName
    """The method's name, with the options that differ from its defaults."""
    method_hash: str
    """Of the method's source, without comments and docstrings."""
    seed: Count


class Metrics(Record):
    """Of one role on the evaluation set."""

    top1: Percent
    top5: Percent
    loss: float
    """Mean cross-entropy."""


class Epoch(Record):
    """One epoch of training and the evaluation after it."""

    epoch: int
    """Counted from 1."""
    learning_rate: float
    """The suite's rate in the last step of the epoch."""
    losses: dict[str, float]
    """Mean of each weighted term over the epoch's steps."""
    metrics: dict[str, Metrics]
    """By role; "ensemble" is the mean probability of the networks, "mean" their mean accuracy."""


class BestOnTest(Record):
    """The epoch with the best student on the test set: optimistic, never the headline."""

    epoch: int
    metrics: dict[str, Metrics]


class Cost(Record):
    """What the run took. Warm-up and evaluation are excluded from rates."""

    images_per_second: Amount | None
    """Median over windows of training steps; None where the run was too short to measure."""
    step_milliseconds: Amount | None
    """Median over the same windows."""
    training_seconds: Amount
    evaluation_seconds: Amount
    peak_memory_bytes: Count
    jobs: Count = 1
    """Runs that shared the device, this one included: only the rates of one are a measure."""
    waiting_share: Amount | None = None
    """Of the training time, for data that was not ready, an upper bound on a GPU; None where all
    images lie in memory."""
    peak_memory_kind: Literal["device", "process"]
    """Device: peak allocated on the GPU. Process: peak resident memory, images included. With
    several processes it is that of the one that took most."""
    parameters_trained: Count
    parameters_deployed: Count
    student_forward_flops: Count
    """Of one image through the deployed student, 2 per multiply-add."""
    training_flops: Annotated[int, Field(ge=0, lt=10**30)] | None = None
    """Of all training steps: forward and backward of all networks on all views, 2 per
    multiply-add; None in results of earlier versions."""


class Environment(Record):
    """What could explain a difference; no host name, no user name, no path."""

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
    """That trained the run together; rates are of all of them."""
    precision: Arithmetic = "fp32"
    deterministic: bool = False
    """Whether operations that give other numbers each time were forbidden; a CPU has none."""
    step: str = "eager"
    """How training steps ran: eagerly, compiled by inductor, replayed as a CUDA graph, or both."""
    command: str
    """Reproduces this run, given the data."""


TRAINED_BEFORE = "trained before on"
"""Note of a run that moved: places, and the steps done in the end there."""


class Result(Record):
    """Everything about one run."""

    schema_version: Literal[1] = SCHEMA_VERSION
    fingerprint: str
    """Of suite, method, options, architecture and seed: equal means the same run."""
    harness: int = 1
    """Version of the harness: another gives other numbers, whatever the method."""
    identity: Identity
    options: dict[str, Any]
    protocol: dict[str, Any]
    """The suite, in full."""
    status: Status
    reason: str | None = None
    """Why a run did not finish."""
    last: dict[str, Metrics] | None
    """The headline, by role: the last epoch."""
    best_on_test: BestOnTest | None
    history: list[Epoch]
    cost: Cost | None
    environment: Environment
    notes: dict[str, Any] = Field(default_factory=dict)
    """What the method wants known about its run."""

    @property
    def is_alone(self) -> bool:
        """Whether rate, time and memory are its own: of one device, which it did not share."""
        shared = self.cost is None or self.cost.jobs > 1
        return not shared and TRAINED_BEFORE not in self.notes

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.status == "finished" and (self.cost is None or "student" not in (self.last or {})):
            raise ValueError("a finished run has a cost and a student in 'last'")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        """What is said twice is said alike, so that no accuracy changes on its own."""
        if [epoch.epoch for epoch in self.history] != list(range(1, len(self.history) + 1)):
            raise ValueError("the epochs of 'history' do not count from 1 without a gap")
        if self.status != "finished":
            return self
        if not all("student" in epoch.metrics for epoch in self.history):
            raise ValueError("an epoch of 'history' has no student")
        if not self.history or self.last != self.history[-1].metrics:
            raise ValueError("'last' is not what 'history' has of the last epoch")
        if self.best_on_test != best_on_test(self.history):
            raise ValueError("'best_on_test' is not the epoch of 'history' with the best student")
        return self


def best_on_test(history: Sequence[Epoch]) -> BestOnTest | None:
    """The first of the epochs with the best student; None before the first epoch."""
    best = max(history, key=lambda epoch: epoch.metrics["student"].top1, default=None)
    return None if best is None else BestOnTest(epoch=best.epoch, metrics=best.metrics)
