"""Worker processes that read, decode and crop images as their tasks say.

Workers are forked from a server process that has imported what they need. Forking the training
process may hang, and spawning a fresh process takes seconds.
"""

import atexit
import multiprocessing
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from math import ceil
from multiprocessing.context import BaseContext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from kdbench.data.encoded.crops import FLIP, random_resized_box
from kdbench.data.encoded.decode import Box, UndecodableError, decode_center, decode_crop
from kdbench.data.encoded.images import EncodedImages
from kdbench.data.encoded.watchdog import Watchdog
from kdbench.signals import exit_with_parent, ignore_stop_signals
from kdbench.suite.sections import RandomResizedCrop

TASK_SIZE = 32
"""Number of images per task. Small tasks spread a batch over all workers."""

POLL_SECONDS = 5
"""Interval in seconds at which the loader checks that its workers are alive."""

TIMEOUT_SECONDS = 60
"""Time in seconds without an image after which loading fails. A task takes about 0.1 s."""

WORKER_DIED = (
    "a process that decodes images died, because it was killed or ran out of memory (/dev/shm "
    "included); use fewer --workers"
)

GRAY = 128
"""Pixel value of images that could not be decoded."""


class LoaderError(Exception):
    """Raised when images can no longer be loaded; the message is the reason."""


class Task(NamedTuple):
    """A request to decode at most TASK_SIZE images."""

    positions: np.ndarray
    """Positions in the image set, (B,)."""
    draws: np.ndarray | None = None
    """Draws in [0, 1) for random crops, (V, B, DRAWS); None for center crops."""


class Chunk(NamedTuple):
    """Result of a task."""

    pixels: Tensor
    """Crops, (V, B, S, S, 3) uint8."""
    blank: list[int]
    """Indices of images that could not be decoded or replaced."""
    undecodable: list[tuple[str, str]]
    """Names of images that could not be decoded, and reasons."""
    failure: str | None = None
    """Reason for the failure of the task: an image cannot be read, or a class has no valid one."""


class Decoder(Dataset[Chunk]):
    """Dataset that maps tasks to decoded chunks.

    With `substitute`, an image that cannot be decoded is replaced with the next valid image of its
    class, which keeps the class balance and is the same in every run. Otherwise, as in evaluation,
    it stays blank.
    """

    def __init__(
        self,
        images: EncodedImages,
        size: int,
        resize: int,
        crop: RandomResizedCrop,
        substitute: bool = True,
    ):
        self.images = images
        self.size = size
        self.resize = resize
        self.crop = crop
        self.substitute = substitute

    def __getitem__(self, task: Task) -> Chunk:
        views = 1 if task.draws is None else len(task.draws)
        shape = (views, len(task.positions), self.size, self.size, 3)
        chunk = Chunk(torch.empty(shape, dtype=torch.uint8), [], [])
        for column, position in enumerate(task.positions.tolist()):
            draws = None if task.draws is None else task.draws[:, column].tolist()
            try:
                crops = self._crops(position, draws, chunk.undecodable)
            except OSError as error:
                reason = f"{self.images.name(position)} cannot be read: {error.strerror or error}"
                return chunk._replace(failure=reason)
            if crops is None and self.substitute:
                label = int(self.images.labels[position])
                return chunk._replace(failure=f"no image of class {label} can be decoded")
            if crops is None:
                chunk.blank.append(column)
            chunk.pixels[:, column] = GRAY if crops is None else crops
        return chunk

    def _crops(
        self, position: int, draws: list[list[float]] | None, undecodable: list[tuple[str, str]]
    ) -> Tensor | None:
        """Return crops (V, S, S, 3) of the image or its substitute, or None without one."""

        def boxes(height: int, width: int) -> list[Box]:
            return [random_resized_box(height, width, d, self.crop) for d in draws or ()]

        for candidate in self._candidates(position):
            encoded = self.images.read(candidate)
            try:
                if draws is None:
                    return decode_center(encoded, self.resize, self.size)
                crops = decode_crop(encoded, boxes, self.size)
                for crop, numbers in zip(crops, draws, strict=True):
                    if numbers[FLIP] < 0.5:  # flip here, while the crop is in the CPU's cache
                        crop.copy_(crop.flip(1))
                return crops
            except UndecodableError as error:
                undecodable.append((self.images.name(candidate), str(error)))
        return None

    def _candidates(self, position: int) -> Iterator[int]:
        """Yield the image and its possible substitutes."""
        yield position
        if self.substitute:
            labels = self.images.labels
            same_class = torch.nonzero(labels == labels[position]).flatten()
            index = int(torch.searchsorted(same_class, position))
            yield from torch.cat([same_class[index + 1 :], same_class[:index]]).tolist()


class _Tasks(Sampler[Task]):
    """Sampler that yields the tasks of the current pass to a persistent loader."""

    def __init__(self) -> None:
        self.source: Iterable[Task] = ()

    def __iter__(self) -> Iterator[Task]:
        return iter(self.source)


_pools: "weakref.WeakSet[DecodePool]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Stop all workers before multiprocessing does.

    It would send them a signal, which they ignore, and wait forever.
    """
    for pool in list(_pools):
        pool.close()


class DecodePool:
    """Worker processes that persist over all passes; they start with the first pass."""

    def __init__(self, decoder: Decoder, batch_size: int):
        self.decoder = decoder
        self.batch_size = batch_size
        self._tasks = _Tasks()
        self._loader: DataLoader[Chunk] | None = None
        self._stop: Callable[[], object] = bool
        self._busy = False
        _pools.add(self)

    def close(self) -> None:
        """Stop the workers; the next pass starts new ones."""
        self._loader = None
        self._stop()

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Chunk]]:
        """Yield each task with its chunk, in order. Only one pass may run at a time.

        Raises:
            LoaderError: A worker died or timed out, an image cannot be read, or no image of a
                class can be decoded.
        """
        if self._busy:
            raise RuntimeError("another pass over the images has not finished")
        pending: deque[Task] = deque()
        self._tasks.source = _track_pending(tasks, pending)
        try:
            chunks = self._start()
        except RuntimeError:  # a worker died since the last pass, before it got a new task
            self.close()
            chunks = self._start()
        self._busy = True
        # The loader's own timeout does not cover fetching pixels from a worker that hangs.
        processes = getattr(chunks, "_workers", [])
        try:
            with Watchdog(processes, TIMEOUT_SECONDS + POLL_SECONDS) as watchdog:
                while (chunk := _next(chunks, watchdog)) is not None:
                    if chunk.failure is not None:
                        raise LoaderError(chunk.failure)
                    yield pending.popleft(), chunk
        except BaseException:
            self.close()  # these workers cannot be used for another pass
            raise
        finally:
            self._busy = False
            self._tasks.source = ()

    def _start(self) -> Iterator[Chunk]:
        """Start a pass, with existing or new workers."""
        if self._loader is not None:
            return iter(self._loader)
        self._loader = self._make_loader()
        chunks = iter(self._loader)
        if self.decoder.images.workers:
            # The finalizer keeps a reference to the iterator, so that it can stop the workers.
            self._stop = weakref.finalize(self, _stop_workers, chunks)
        return chunks

    def _make_loader(self) -> DataLoader[Chunk]:
        images = self.decoder.images
        options: dict[str, Any] = {}
        if images.workers:
            ahead = 2 * ceil(self.batch_size / TASK_SIZE)  # two whole batches
            options = {
                "num_workers": images.workers,
                "persistent_workers": True,
                "multiprocessing_context": _context(),
                "prefetch_factor": max(2, ceil(ahead / images.workers)),
                "timeout": POLL_SECONDS,
                "worker_init_fn": _init_worker,
            }
        return DataLoader(
            self.decoder,
            batch_size=None,
            sampler=self._tasks,
            pin_memory=images.device.type == "cuda",
            generator=torch.Generator(),  # the default would change the run's random state
            **options,
        )


def _init_worker(worker: int) -> None:
    """Make a worker ignore signals and exit together with the run."""
    ignore_stop_signals()
    exit_with_parent()


def _stop_workers(iterator: Any) -> None:
    """Ask the workers to exit, then kill them."""
    iterator._shutdown_workers()
    for process in iterator._workers:
        process.kill()


def _track_pending(tasks: Iterable[Task], pending: deque[Task]) -> Iterator[Task]:
    for task in tasks:
        pending.append(task)
        yield task


def _context() -> BaseContext:
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["kdbench.data.encoded.forkserver", "kdbench.data.encoded.workers"]
    )
    return context


def _next(chunks: Iterator[Chunk], watchdog: Watchdog) -> Chunk | None:
    """Return the next chunk, or None after the last.

    The loader checks for dead workers only when its timeout expires, so the timeout is short.
    """
    started = time.monotonic()
    while True:
        try:
            with watchdog.waiting():
                return next(chunks, None)
        except (EOFError, OSError) as error:  # the worker died while its pixels were fetched
            raise LoaderError(_failure_message(watchdog)) from error
        except RuntimeError as error:
            if "exited unexpectedly" in str(error):
                raise LoaderError(_failure_message(watchdog)) from error
            if "timed out" not in str(error):
                raise
            if time.monotonic() - started >= TIMEOUT_SECONDS:
                raise LoaderError(_timeout_message()) from error


def _failure_message(watchdog: Watchdog) -> str:
    return _timeout_message() if watchdog.timed_out else WORKER_DIED


def _timeout_message() -> str:
    return (
        f"no image was decoded for {TIMEOUT_SECONDS} seconds, because the disk or a process that "
        "decodes images hangs"
    )
