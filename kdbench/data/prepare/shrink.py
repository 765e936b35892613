"""Resizing of encoded images, in several processes."""

import contextlib
import multiprocessing
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import NamedTuple

import simplejpeg
import torch

from kdbench.data.encoded.decode import UndecodableError, decode, resize_pixels, shorter_side_to
from kdbench.data.sources.stream import Row
from kdbench.errors import UserError
from kdbench.signals import exit_with_parent

MAX_JPEG_SIDE = 65_535
"""Maximum height and width in pixels that the JPEG format allows."""


class ShrunkRow(NamedTuple):
    """A row with a smaller image."""

    encoded: bytes
    label: int
    path: str | None
    undecodable: str | None
    """Reason why the image cannot be decoded, with its path."""


ShrinkAll = Callable[[Iterable[Sequence[Row]]], Iterator[list[ShrunkRow]]]
"""Function that maps chunks of rows to rows with smaller images, in order."""


def shrink(encoded: bytes, shorter_side: int, quality: int) -> bytes:
    """Return an image as JPEG (4:2:0) with the given shorter side in pixels.

    Images that are not larger are returned unchanged.

    Raises:
        UndecodableError: The bytes are not a complete image.
    """
    pixels = decode(encoded)
    height, width = shorter_side_to(shorter_side, *pixels.shape[:2])
    if height >= len(pixels) or max(height, width) > MAX_JPEG_SIDE:
        return encoded
    small = resize_pixels(pixels, height, width).numpy()
    return simplejpeg.encode_jpeg(small, quality=quality, colorsubsampling="420")


def shrink_rows(rows: Sequence[Row], shorter_side: int, quality: int) -> list[ShrunkRow]:
    """Return rows with smaller images; images that cannot be decoded keep their bytes."""
    kept = []
    for encoded, label, path in rows:
        try:
            kept.append(ShrunkRow(shrink(encoded, shorter_side, quality), label, path, None))
        except UndecodableError as error:
            reason = f"{path}: {error}" if path else str(error)
            kept.append(ShrunkRow(encoded, label, path, reason))
    return kept


@contextlib.contextmanager
def shrink_pool(shorter_side: int, quality: int, workers: int) -> Iterator[ShrinkAll]:
    """Return a context with a function that shrinks chunks of rows in `workers` processes.

    One worker means this process.

    Raises:
        UserError: A process was killed.
    """
    shrink_chunk = partial(shrink_rows, shorter_side=shorter_side, quality=quality)
    if workers == 1:
        yield partial(map, shrink_chunk)
        return
    # Spawn, because a process that is forked after torch has been used may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_init_worker)
    try:
        with _ctrl_c_ignored():  # inherited by the processes; only this one handles Ctrl-C
            for _ in range(workers):
                pool.submit(int)  # starts a process
        yield partial(_map_in_order, pool, shrink_chunk, 2 * workers)
    except BrokenProcessPool as error:
        raise UserError(
            "A process was killed, perhaps because it ran out of memory; use fewer --workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _map_in_order(
    pool: ProcessPoolExecutor,
    shrink_chunk: Callable[[Sequence[Row]], list[ShrunkRow]],
    max_pending: int,
    chunks: Iterable[Sequence[Row]],
) -> Iterator[list[ShrunkRow]]:
    """Yield results in the order of the chunks, with at most `max_pending` chunks in memory."""
    pending: deque[Future[list[ShrunkRow]]] = deque()
    for chunk in chunks:
        pending.append(pool.submit(shrink_chunk, chunk))
        if len(pending) == max_pending:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


@contextlib.contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)


def _init_worker() -> None:
    """Make a process of the pool use one thread and exit with its parent."""
    torch.set_num_threads(1)
    exit_with_parent()
