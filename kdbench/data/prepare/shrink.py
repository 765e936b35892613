"""Encoded images made smaller, in several processes."""

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

from kdbench.data.encoded.decode import UndecodableError, decode, resized, shorter_side_to
from kdbench.data.sources.stream import Row
from kdbench.errors import UserError
from kdbench.signals import end_with_parent

LONGEST_JPEG = 65_535


class Kept(NamedTuple):
    """What is kept of a row."""

    encoded: bytes
    label: int
    path: str | None
    undecodable: str | None
    """Why the image cannot be decoded, and its path."""


KeepAll = Callable[[Iterable[Sequence[Row]]], Iterator[list[Kept]]]
"""Chunks of rows to what is kept of them, in order."""


def shrink(encoded: bytes, shorter_side: int, quality: int) -> bytes:
    """The image as JPEG (4:2:0) with its shorter side at `shorter_side` pixels.

    One that is not larger keeps its bytes.

    Raises:
        UndecodableError: it is no whole image.
    """
    pixels = decode(encoded)
    height, width = shorter_side_to(shorter_side, *pixels.shape[:2])
    if height >= len(pixels) or max(height, width) > LONGEST_JPEG:
        return encoded
    small = resized(pixels, height, width).numpy()
    return simplejpeg.encode_jpeg(small, quality=quality, colorsubsampling="420")


def keep(rows: Sequence[Row], shorter_side: int, quality: int) -> list[Kept]:
    """Rows with smaller images; one that cannot be decoded keeps its bytes."""
    kept = []
    for encoded, label, path in rows:
        try:
            kept.append(Kept(shrink(encoded, shorter_side, quality), label, path, None))
        except UndecodableError as error:
            reason = f"{path}: {error}" if path else str(error)
            kept.append(Kept(encoded, label, path, reason))
    return kept


@contextlib.contextmanager
def shrinking(shorter_side: int, quality: int, workers: int) -> Iterator[KeepAll]:
    """Shrinks the images of chunks of rows in `workers` processes; in this one where that is 1.

    Raises:
        UserError: a process was killed.
    """
    work = partial(keep, shorter_side=shorter_side, quality=quality)
    if workers == 1:
        yield partial(map, work)
        return
    # Forked after torch has run, a process may hang.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin)
    try:
        with _ctrl_c_ignored():  # which the processes inherit; Ctrl-C is this one's to answer
            for _ in range(workers):
                pool.submit(int)  # starts a process
        yield partial(_in_order, pool, work, 2 * workers)
    except BrokenProcessPool as error:
        raise UserError(
            "A process was killed, perhaps since memory ran out: try fewer --workers."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _in_order(
    pool: ProcessPoolExecutor,
    work: Callable[[Sequence[Row]], list[Kept]],
    ahead: int,
    chunks: Iterable[Sequence[Row]],
) -> Iterator[list[Kept]]:
    """Results in the chunks' order; no more than `ahead` chunks are in memory."""
    waiting: deque[Future[list[Kept]]] = deque()
    for chunk in chunks:
        waiting.append(pool.submit(work, chunk))
        if len(waiting) == ahead:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextlib.contextmanager
def _ctrl_c_ignored() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _begin() -> None:
    """A process of the pool: one thread, and never without its parent."""
    torch.set_num_threads(1)
    end_with_parent()
