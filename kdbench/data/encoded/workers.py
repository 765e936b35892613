"""Processes that read, decode and crop; which image and which crop is decided by who asks.

They are forked from a server that has imported what they need and nothing else: a fork of a process
that trains may hang, and one that imports everything anew takes seconds.
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
from kdbench.signals import end_with_parent, leave_to_the_run
from kdbench.suite.sections import RandomResizedCrop

TASK = 32
"""Images at a time: many small tasks spread a batch over all workers."""

POLL_SECONDS = 5
PATIENCE_SECONDS = 60
"""Without an image; TASK of them take a tenth of a second."""

DIED = (
    "a process that decodes images died: it was killed, or memory (/dev/shm included) ran out; "
    "fewer --workers need less"
)

GREY = 128


class LoaderError(Exception):
    """Images cannot be read any more; the message is the reason."""


class Task(NamedTuple):
    """Up to TASK images to decode."""

    positions: np.ndarray
    """(B,), in the image set."""
    draws: np.ndarray | None = None
    """(V, B, DRAWS) in [0, 1) for random crops; None for the centre."""


class Chunk(NamedTuple):
    """What became of a task."""

    pixels: Tensor
    """(V, B, S, S, 3), uint8."""
    blank: list[int]
    """Columns without a picture."""
    undecodable: list[tuple[str, str]]
    """Names and reasons."""
    failure: str | None = None
    """Why there are no pixels: the disk did not give an image, or none of a class is one."""


class Decoder(Dataset[Chunk]):
    """Carries out tasks.

    An image that cannot be decoded is replaced by the next of its class that can be, as the order
    of the set has them: the class keeps its weight, and every run takes the same one. Where
    `substitute` is false, as in evaluation, its place stays blank.
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
            chunk.pixels[:, column] = GREY if crops is None else crops
        return chunk

    def _crops(
        self, position: int, draws: list[list[float]] | None, undecodable: list[tuple[str, str]]
    ) -> Tensor | None:
        """(V, S, S, 3) of the image or its substitute; None without one."""

        def boxes(height: int, width: int) -> list[Box]:
            return [random_resized_box(height, width, d, self.crop) for d in draws or ()]

        for candidate in self._candidates(position):
            encoded = self.images.read(candidate)
            try:
                if draws is None:
                    return decode_center(encoded, self.resize, self.size)
                crops = decode_crop(encoded, boxes, self.size)
                for crop, numbers in zip(crops, draws, strict=True):
                    if numbers[FLIP] < 0.5:  # half of them; here a crop is still in a cache
                        crop.copy_(crop.flip(1))
                return crops
            except UndecodableError as error:
                undecodable.append((self.images.name(candidate), str(error)))
        return None

    def _candidates(self, position: int) -> Iterator[int]:
        """The image, and those after it that may stand in."""
        yield position
        if self.substitute:
            labels = self.images.labels
            mates = torch.nonzero(labels == labels[position]).flatten()
            start = int(torch.searchsorted(mates, position))
            yield from torch.cat([mates[start + 1 :], mates[:start]]).tolist()


class _Tasks(Sampler[Task]):
    """The tasks of one pass after the other, to a loader that stays."""

    def __init__(self) -> None:
        self.source: Iterable[Task] = ()

    def __iter__(self) -> Iterator[Task]:
        return iter(self.source)


_pools: "weakref.WeakSet[DecodePool]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    """Before multiprocessing asks its processes to end by a signal, which workers leave to the run,
    and waits for them for ever.
    """
    for pool in list(_pools):
        pool.close()


class DecodePool:
    """Workers that stay for all passes; they start with the first. One pass at a time."""

    def __init__(self, decoder: Decoder, batch_size: int):
        self.decoder = decoder
        self.batch_size = batch_size
        self._tasks = _Tasks()
        self._loader: DataLoader[Chunk] | None = None
        self._end: Callable[[], object] = bool
        self._busy = False
        _pools.add(self)

    def close(self) -> None:
        """End the workers; the next pass starts others."""
        self._loader = None
        self._end()

    def run(self, tasks: Iterable[Task]) -> Iterator[tuple[Task, Chunk]]:
        """What becomes of each task, in order.

        Raises:
            LoaderError: a worker died or hangs, the disk does not give an image, or none of a
                class can be decoded.
        """
        if self._busy:
            raise RuntimeError("one pass over the images is not at its end")
        pending: deque[Task] = deque()
        self._tasks.source = _noted(tasks, pending)
        try:
            chunks = self._start()
        except RuntimeError:  # a worker died since the last pass; none has a task of this one yet
            self.close()
            chunks = self._start()
        self._busy = True
        # The loader's own time-out does not hold while it fetches pixels from a worker that hangs.
        processes = getattr(chunks, "_workers", [])
        try:
            with Watchdog(processes, PATIENCE_SECONDS + POLL_SECONDS) as watchdog:
                while (chunk := _next(chunks, watchdog)) is not None:
                    if chunk.failure is not None:
                        raise LoaderError(chunk.failure)
                    yield pending.popleft(), chunk
        except BaseException:
            self.close()  # workers that died, hang or still decode serve no other pass
            raise
        finally:
            self._busy = False
            self._tasks.source = ()

    def _start(self) -> Iterator[Chunk]:
        """A pass, by workers that are there or by new ones."""
        if self._loader is not None:
            return iter(self._loader)
        self._loader = self._make_loader()
        chunks = iter(self._loader)
        if self.decoder.images.workers:
            # It holds what it ends: once they are garbage themselves, nothing reaches the workers.
            self._end = weakref.finalize(self, _end_workers, chunks)
        return chunks

    def _make_loader(self) -> DataLoader[Chunk]:
        images = self.decoder.images
        options: dict[str, Any] = {}
        if images.workers:
            ahead = 2 * ceil(self.batch_size / TASK)  # two whole batches
            options = {
                "num_workers": images.workers,
                "persistent_workers": True,
                "multiprocessing_context": _context(),
                "prefetch_factor": max(2, ceil(ahead / images.workers)),
                "timeout": POLL_SECONDS,
                "worker_init_fn": _begin,
            }
        return DataLoader(
            self.decoder,
            batch_size=None,
            sampler=self._tasks,
            pin_memory=images.device.type == "cuda",
            generator=torch.Generator(),  # or each pass would draw from the run's
            **options,
        )


def _begin(worker: int) -> None:
    """A worker leaves signals to the run, and ends with it."""
    leave_to_the_run()
    end_with_parent()


def _end_workers(iterator: Any) -> None:
    """Ask them, then make them."""
    iterator._shutdown_workers()
    for process in iterator._workers:
        process.kill()


def _noted(tasks: Iterable[Task], pending: deque[Task]) -> Iterator[Task]:
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
    """The next chunk; None after the last.

    The loader notices a dead worker only when it looks up, so it is made to look up often.
    """
    started = time.monotonic()
    while True:
        try:
            with watchdog.waiting():
                return next(chunks, None)
        except (EOFError, OSError) as error:  # it died while its pixels were fetched
            raise LoaderError(_hangs() if watchdog.has_bitten else DIED) from error
        except RuntimeError as error:
            if "exited unexpectedly" in str(error):
                raise LoaderError(_hangs() if watchdog.has_bitten else DIED) from error
            if "timed out" not in str(error):
                raise
            if time.monotonic() - started >= PATIENCE_SECONDS:
                raise LoaderError(_hangs()) from error


def _hangs() -> str:
    return (
        f"no image was decoded for {PATIENCE_SECONDS} seconds: the disk or a process that decodes "
        "hangs"
    )
