"""What a benchmark measured, as JSON keeps it."""

from kdbench.results.schema import Environment, Record


class Spread(Record):
    """Of one figure over the rounds."""

    median: float
    quartiles: tuple[float, float]


class StepCost(Record):
    """One method, one architecture, one way of running steps."""

    method: str
    architecture: str
    networks: int
    views: int
    step: str
    """How it ran: eagerly, compiled, as a CUDA graph."""
    milliseconds: Spread
    """Per training step, its data included."""
    images_per_second: float
    ratio: Spread | None
    """To the reference with as many networks, of the same round; None where that cannot be."""
    data_share: float
    """Of the step's time, for making its batch."""
    peak_memory_bytes: int
    """That a step adds to what the process held, weights and optimizers included."""
    operations: int
    """Of an eager step."""
    bytes: int
    """That the operations of an eager step read and write, each on its own."""
    flops: int
    """Of a step, 2 per multiply-add."""
    floor_milliseconds: float
    """The longer of bytes and FLOPs over the device's measured rates."""


class Benchmark(Record):
    """All that was measured in one process, round by round in turn."""

    suite: str
    batch_size: int
    against: str
    rounds: int
    date: str
    environment: Environment
    bytes_per_second: float
    flops_per_second: float
    rows: list[StepCost]
