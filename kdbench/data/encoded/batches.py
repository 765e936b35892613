"""Batches of encoded images: cropped and flipped by workers, normalised on the device.

As with images in memory, order and draws depend on (seed, epoch, step) alone, whatever the number
of workers.
"""

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import islice
from math import ceil

import torch
from torch import Tensor

from kdbench.data.decoded.batches import Normalise, epoch_order, slice_of
from kdbench.data.encoded.crops import DRAWS, FLIP
from kdbench.data.encoded.images import EncodedImages
from kdbench.data.encoded.workers import TASK, Chunk, DecodePool, Decoder, Task
from kdbench.seeds import generator
from kdbench.suite.suite import Suite

IGNORE_INDEX = -100
"""Label of an image that could not be shown: wrong whatever is predicted, and without a loss."""

Parts = list[tuple[Task, Chunk]]


class EncodedTrainingBatches:
    """V random crops of shuffled training images, in whole global batches.

    With several processes each takes its slice of every global batch.

    Raises:
        UserError: the global batch cannot be shared out evenly.
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
        self.mine = slice_of(suite, rank, processes)
        self.waited_seconds: float | None = 0.0
        """For batches that were not ready. On a GPU an upper bound: a wait counts in full if the
        device had nothing left to do at its end. Starting the workers does not count."""
        self.undecodable: dict[str, str] = {}
        """Reasons by name, of all that were met."""
        self.notes = images.notes
        self._share = self.mine.stop - self.mine.start
        self._pool = DecodePool(_decoder(images, suite), self._share)
        self._finish = BatchAssembler(images, suite)
        self._warm = False

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """(V, B, 3, H, W) float32 views in channels-last memory and (B,) labels, step by step.

        From step `start` on they are those of the whole epoch.

        Raises:
            LoaderError: a worker died or hangs, or the disk does not give an image.
        """
        chunks = self._pool.run(self._tasks(epoch, start))
        while parts := self._wait(chunks):
            _note(parts, self.undecodable)
            yield self._finish(parts)

    def _tasks(self, epoch: int, first: int = 0) -> Iterator[Task]:
        order = epoch_order(self.seed, epoch, len(self.images), self.batch_size)
        for step in range(first, len(self)):
            chosen = order[step][self.mine].numpy()
            draws = self._draws(epoch, step).numpy()
            for start in range(0, self._share, TASK):
                part = slice(start, start + TASK)
                yield Task(chosen[part], draws[:, part])

    def _draws(self, epoch: int, step: int) -> Tensor:
        """(V, B, DRAWS) of this process's slice."""
        shape = (self.batch_size, DRAWS)
        views = [
            torch.rand(shape, generator=generator(self.seed, "view", epoch, view, step))[self.mine]
            for view in range(self.views)
        ]
        draws = torch.stack(views)
        if not self.flips:
            draws[:, :, FLIP] = 1
        return draws

    def _wait(self, chunks: Iterator[tuple[Task, Chunk]]) -> Parts:
        """The parts of the next batch; none after the last."""
        asked = _mark(self.images.device)
        started = time.perf_counter()
        parts = list(islice(chunks, ceil(self._share / TASK)))
        waited = time.perf_counter() - started
        idle = asked is None or asked.query()
        if self._warm and idle and self.waited_seconds is not None:
            self.waited_seconds += waited
        self._warm = True
        return parts


class EncodedEvaluationBatches:
    """The centre of all images once, in order; with several processes each takes every n-th.

    An image that cannot be decoded is grey and IGNORE_INDEX; with `substitute` another of its class
    stands in, as in training.
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
        self._finish = BatchAssembler(images, suite)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        chunks = self._pool.run(self._tasks())
        while parts := list(islice(chunks, ceil(self.batch_size / TASK))):
            _note(parts, self.undecodable)
            views, labels = self._finish(parts)
            yield views[0], labels

    def _tasks(self) -> Iterator[Task]:
        for batch in self.positions.split(self.batch_size):
            yield from (Task(part.numpy()) for part in batch.split(TASK))


def _decoder(images: EncodedImages, suite: Suite, substitute: bool = True) -> Decoder:
    data, crop = suite.data, suite.augmentation.random_resized_crop
    assert data.resize is not None and crop is not None  # the suite was validated
    return Decoder(images, data.image_size, data.resize, crop, substitute)


def _note(parts: Parts, undecodable: dict[str, str]) -> None:
    for _, chunk in parts:
        undecodable.update(chunk.undecodable)


def _mark(device: torch.device) -> torch.cuda.Event | None:
    """All that the device was asked to do so far; None where it does things at once."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record()
    return event


AHEAD = 2
"""Batches that wait on a device at most: a step is one launch where it was recorded, and the host
would fill the device's memory with what it cannot train on yet."""


@contextmanager
def _one_thread() -> Iterator[None]:
    """OpenMP's threads spin after each operation, on cores that other processes decode on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class BatchAssembler:
    """Puts a batch together on the device, beside what the device still does for the last step."""

    def __init__(self, images: EncodedImages, suite: Suite):
        self.labels = images.labels
        self.device = images.device
        self.size = suite.data.image_size
        self.normalise = Normalise(suite.augmentation, self.device, repeat=self.size)
        self.stream: torch.cuda.Stream | None = None
        if self.device.type == "cuda":
            self.stream = torch.cuda.Stream(self.device)
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        self._asked: deque[torch.cuda.Event] = deque()

    def __call__(self, parts: Parts) -> tuple[Tensor, Tensor]:
        """(V, B, 3, H, W) float32 views in channels-last memory and (B,) labels."""
        if self.stream is not None:
            self._asked.append(torch.cuda.current_stream(self.device).record_event())
            if len(self._asked) > AHEAD:
                self._asked.popleft().synchronize()
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
        for task, chunk in parts:  # a part of a batch fits into a CPU's cache
            pixels = chunk.pixels.to(self.device, non_blocking=True)
            stop = start + len(task.positions)
            self.normalise(pixels.flatten(3), out=views[:, start:stop].flatten(3))
            start = stop
        return views

    def _labels(self, parts: Parts) -> Tensor:
        labels = []
        for task, chunk in parts:
            own = self.labels[torch.from_numpy(task.positions)]
            own[chunk.blank] = IGNORE_INDEX
            labels.append(own)
        return torch.cat(labels)
