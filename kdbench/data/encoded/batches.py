"""Batches of encoded images, which workers decode, crop and flip and the device normalizes.

As for images in memory, order and random draws depend on (seed, epoch, step) alone, not on the
number of workers.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from math import ceil

import torch
from torch import Tensor

from kdbench.data.decoded.batches import Normalize, batch_slice, epoch_order
from kdbench.data.encoded.crops import DRAWS, FLIP
from kdbench.data.encoded.images import EncodedImages
from kdbench.data.encoded.workers import TASK_SIZE, Chunk, DecodePool, Decoder, Task
from kdbench.seeds import generator
from kdbench.suite.suite import Suite

IGNORE_INDEX = -100
"""Label of an image that could not be decoded. It counts as misclassified and adds no loss."""

Parts = list[tuple[Task, Chunk]]


class EncodedTrainingBatches:
    """Batches of V random crops of shuffled training images, in whole global batches.

    With several processes, each takes its slice of every global batch.

    Raises:
        UserError: the number of processes does not divide the global batch size.
    """

    def __init__(
        self,
        images: EncodedImages,
        suite: Suite,
        seed: int,
        views: int,
        rank: int = 0,
        processes: int = 1,
    ):
        self.images = images
        self.seed = seed
        self.views = views
        self.batch_size = suite.batch_size
        self.flips = suite.augmentation.horizontal_flip
        self.local_slice = batch_slice(suite, rank, processes)
        self.waited_seconds: float | None = 0.0
        """Seconds spent waiting for batches that were not ready, without the start of the workers.
        On a GPU it is an upper bound: a wait counts in full if the device is idle at its end."""
        self.undecodable: dict[str, str] = {}
        """Names of the images that could not be decoded so far, with reasons."""
        self.notes = images.notes
        self._share = self.local_slice.stop - self.local_slice.start
        self._pool = DecodePool(_decoder(images, suite), self._share)
        self._assemble = BatchAssembler(images, suite)
        self._workers_started = False

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the views and labels of each step from step `start` on.

        Views are (V, B, 3, H, W) float32 in channels-last memory, labels are (B,). `start` does not
        change what the remaining steps yield.

        Raises:
            LoaderError: a worker died or hangs, or an image cannot be read from disk.
        """
        chunks = self._pool.run(self._tasks(epoch, start))
        while parts := self._wait_for_batch(chunks):
            _record_undecodable(parts, self.undecodable)
            yield self._assemble(parts)

    def _tasks(self, epoch: int, first: int = 0) -> Iterator[Task]:
        order = epoch_order(self.seed, epoch, len(self.images), self.batch_size)
        for step in range(first, len(self)):
            positions = order[step][self.local_slice].numpy()
            draws = self._draws(epoch, step).numpy()
            for start in range(0, self._share, TASK_SIZE):
                part = slice(start, start + TASK_SIZE)
                yield Task(positions[part], draws[:, part])

    def _draws(self, epoch: int, step: int) -> Tensor:
        """Draw (V, B, DRAWS) numbers in [0, 1) for this process's slice of a batch."""
        shape = (self.batch_size, DRAWS)
        views = []
        for view in range(self.views):
            source = generator(self.seed, "view", epoch, view, step)
            views.append(torch.rand(shape, generator=source)[self.local_slice])
        draws = torch.stack(views)
        if not self.flips:
            draws[:, :, FLIP] = 1
        return draws

    def _wait_for_batch(self, chunks: Iterator[tuple[Task, Chunk]]) -> Parts:
        """Return the parts of the next batch, or an empty list after the last."""
        queued_work = _record_event(self.images.device)
        started = time.perf_counter()
        parts = list(islice(chunks, ceil(self._share / TASK_SIZE)))
        waited = time.perf_counter() - started
        is_idle = queued_work is None or queued_work.query()
        if self._workers_started and is_idle and self.waited_seconds is not None:
            self.waited_seconds += waited
        self._workers_started = True
        return parts


class EncodedEvaluationBatches:
    """Batches of the center crops of all images once, in order.

    With n processes, each takes every n-th image. An image that cannot be decoded becomes gray with
    the label IGNORE_INDEX. With `substitute`, another image of its class replaces it, as in
    training.
    """

    def __init__(
        self,
        images: EncodedImages,
        suite: Suite,
        rank: int = 0,
        processes: int = 1,
        substitute: bool = False,
    ):
        self.positions = torch.arange(rank, len(images), processes)
        self.batch_size = suite.evaluation_batch_size
        self.undecodable: dict[str, str] = {}
        self._pool = DecodePool(_decoder(images, suite, substitute), self.batch_size)
        self._assemble = BatchAssembler(images, suite)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        chunks = self._pool.run(self._tasks())
        while parts := list(islice(chunks, ceil(self.batch_size / TASK_SIZE))):
            _record_undecodable(parts, self.undecodable)
            views, labels = self._assemble(parts)
            yield views[0], labels

    def _tasks(self) -> Iterator[Task]:
        for batch in self.positions.split(self.batch_size):
            yield from (Task(part.numpy()) for part in batch.split(TASK_SIZE))


def _decoder(images: EncodedImages, suite: Suite, substitute: bool = True) -> Decoder:
    data, crop = suite.data, suite.augmentation.random_resized_crop
    assert data.resize is not None and crop is not None  # guaranteed by the suite's validation
    return Decoder(images, data.image_size, data.resize, crop, substitute)


def _record_undecodable(parts: Parts, undecodable: dict[str, str]) -> None:
    for _, chunk in parts:
        undecodable.update(chunk.undecodable)


def _record_event(device: torch.device) -> torch.cuda.Event | None:
    """Record an event after all queued work, or return None if the device runs synchronously."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event


MAX_QUEUED_BATCHES = 2
"""Maximum number of batches queued on a device. With CUDA graphs a step is a single launch, so
without a limit the host would fill the device's memory with batches."""


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread.

    OpenMP threads spin after each operation and would take cores from the decoding workers.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class BatchAssembler:
    """Assembly of batches on the device, concurrently with the device's work on the last step."""

    def __init__(self, images: EncodedImages, suite: Suite):
        self.labels = images.labels
        self.device = images.device
        self.size = suite.data.image_size
        self.normalize = Normalize(suite.augmentation, self.device, repeat=self.size)
        self.stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self.stream = torch.cuda.Stream(self.device)
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        self._queued: deque[torch.cuda.Event] = deque()

    def __call__(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """Return (V, B, 3, H, W) float32 views in channels-last memory and (B,) labels."""
        if self.stream is not None:
            self._queued.append(torch.cuda.current_stream(self.device).record_event())
            if len(self._queued) > MAX_QUEUED_BATCHES:
                self._queued.popleft().synchronize()
        with nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            with _one_thread():
                views = self._views(parts)
            labels = self._labels(parts).to(self.device, non_blocking=True)
        if self.stream is not None:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self.stream)
            views.record_stream(current)
            labels.record_stream(current)
        return views.permute(0, 1, 4, 2, 3), labels

    def _views(self, parts: Parts) -> Tensor:
        count = sum(len(task.positions) for task, _ in parts)
        shape = (len(parts[0][1].pixels), count, self.size, self.size, 3)
        views = torch.empty(shape, device=self.device)
        start = 0
        for task, chunk in parts:  # one part at a time, because a part fits into the CPU's cache
            pixels = chunk.pixels.to(self.device, non_blocking=True)
            stop = start + len(task.positions)
            self.normalize(pixels.flatten(3), out=views[:, start:stop].flatten(3))
            start = stop
        return views

    def _labels(self, parts: Parts) -> Tensor:
        labels = []
        for task, chunk in parts:
            task_labels = self.labels[torch.from_numpy(task.positions)]
            task_labels[chunk.blank] = IGNORE_INDEX
            labels.append(task_labels)
        return torch.cat(labels)
