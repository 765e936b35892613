"""Signs of life that the processes of a plan give one another: a machine that dies says nothing."""

import time

from torch import distributed

GIVE_SECONDS = 5.0
"""Between two signs, and between two looks at those of the others."""

LOOKS = 24
"""In vain, one after the other, until a process is held for lost: two minutes, in which this
process was awake itself. A sign is given whatever a main thread does meanwhile."""


class Pulse:
    """One process's own, and for the main one that of all the others."""

    def __init__(self, store: distributed.Store, rank: int, count: int):
        self._store = store
        self._rank = rank
        self._given = 0
        self._due = 0.0
        self._last = dict.fromkeys(range(1, count), b"")
        self._in_vain = dict.fromkeys(self._last, 0)

    def beat(self) -> int | None:
        """Give a sign where one is due; the main process gets the first other that gives none.

        Raises:
            DistError: the store is gone.
        """
        if time.monotonic() < self._due:
            return None
        self._due = time.monotonic() + GIVE_SECONDS
        if self._rank != 0:
            self._given += 1
            self._store.set(_key(self._rank), str(self._given))
            return None
        for other, last in self._last.items():
            key = _key(other)
            self._last[other] = self._store.get(key) if self._store.check([key]) else b""
            self._in_vain[other] = 0 if self._last[other] != last else self._in_vain[other] + 1
        return next((other for other, looks in self._in_vain.items() if looks >= LOOKS), None)


def _key(rank: int) -> str:
    return f"alive/{rank}"
