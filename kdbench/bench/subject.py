"""A method set up for timing, on random images of the suite's shape."""

from collections.abc import Callable, Iterator
from math import ceil

from torch import Tensor

from kdbench.bench.roofline import StepWork, count_step_work
from kdbench.data import Images, TrainingBatches
from kdbench.engine.measure import MemoryMeter, synchronized_time
from kdbench.engine.optimizers import build_optimizers
from kdbench.engine.spec import RunSpec
from kdbench.engine.step import WARMUP_STEPS, Mode, TrainingStep, state_tensors

MIN_WINDOW_SECONDS = 0.2
"""Least duration of a timed window."""


class Subject:
    """A method whose training steps can be timed window by window."""

    def __init__(
        self,
        spec: RunSpec,
        mode: Mode,
        images: Images,
        on_fallback: Callable[[str], None] = lambda reason: None,
    ):
        suite = spec.suite
        self.spec = spec
        self.device = images.pixels.device
        method = spec.build_on(self.device).train()
        method.begin_epoch(0)
        self.method = method
        optimizers = build_optimizers(method, suite.optimizer, capturable="graph" in mode)
        self.optimizers = optimizers
        self.batches = TrainingBatches(images, suite, spec.seed, spec.views)
        self._stream = self._endless()
        self.work = self._count()
        self.step = TrainingStep(method, optimizers, suite.precision, mode, on_fallback)
        if "graph" in mode:  # the replay allocates nothing, so the recording is measured
            self.peak_memory_bytes = self._peak_memory(WARMUP_STEPS + 2)
        else:
            self.train(WARMUP_STEPS + 2)
            self.peak_memory_bytes = self._peak_memory(2)
        self.steps = max(1, ceil(MIN_WINDOW_SECONDS / self.train(1)))

    def train(self, steps: int) -> float:
        """Train and return the seconds per step, including the making of its batch."""
        started = synchronized_time(self.device)
        for _ in range(steps):
            self.step(*next(self._stream))
        return (synchronized_time(self.device) - started) / steps

    def load(self, steps: int) -> float:
        """Make batches and return the seconds per batch."""
        started = synchronized_time(self.device)
        for _ in range(steps):
            next(self._stream)
        return (synchronized_time(self.device) - started) / steps

    def _endless(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch = 0
        while True:
            yield from self.batches.epoch(epoch)
            epoch += 1

    def _count(self) -> StepWork:
        """Count the work of an eager step."""
        views, labels = next(self._stream)
        eager = TrainingStep(self.method, self.optimizers, self.spec.suite.precision)
        eager(views, labels)  # optimizers create their state in the first step
        return count_step_work(lambda: eager(views, labels))

    def _peak_memory(self, steps: int) -> int:
        held = state_tensors(self.method, self.optimizers)
        held += [p.grad for p in self.method.parameters() if p.grad is not None]
        meter = MemoryMeter(self.device)
        before = meter.peak()
        self.train(steps)
        return meter.peak() - before + sum(tensor.nbytes for tensor in held)
