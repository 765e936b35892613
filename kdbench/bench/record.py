"""The schema of benchmark results."""

from kdbench.results.schema import Environment, Record


class Spread(Record):
    """Median and quartiles of one figure over the rounds."""

    median: float
    quartiles: tuple[float, float]


class StepCost(Record):
    """Cost of a training step of one method and architecture, run in one way."""

    method: str
    architecture: str
    networks: int
    views: int
    step: str
    """Mode in which the steps ran: eager, compiled, or as a CUDA graph."""
    milliseconds: Spread
    """Time of a training step in milliseconds, including the making of its batch."""
    images_per_second: float
    ratio: Spread | None
    """Ratio of step times to the reference with the same number of networks in the same round;
    None if there is no such reference."""
    data_share: float
    """Share of the step's time that is spent making its batch."""
    peak_memory_bytes: int
    """Memory in bytes that the method adds to the process, including weights and optimizers."""
    operations: int
    """Number of operations of an eager step."""
    bytes: int
    """Bytes that the operations of an eager step read and write, each counted separately."""
    flops: int
    """FLOPs of a step, counting 2 per multiply-add."""
    floor_milliseconds: float
    """Least possible time of a step in milliseconds: bytes or FLOPs over the device's measured
    rates, whichever is longer."""


class Benchmark(Record):
    """Everything that one `kdbench bench` command measured."""

    suite: str
    batch_size: int
    against: str
    rounds: int
    date: str
    environment: Environment
    bytes_per_second: float
    flops_per_second: float
    rows: list[StepCost]
