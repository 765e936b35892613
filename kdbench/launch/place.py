"""The place of this process among those that a launcher started, as its environment says."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from kdbench.errors import UserError

WATCH_SECONDS = 1.0

STUCK_SECONDS = 30.0
"""After which a process that should end, and waits for another one, ends at once."""


@dataclass(frozen=True)
class Place:
    """torchrun and `accelerate launch` set all four; where nobody did, the process is alone."""

    rank: int = 0
    processes: int = 1
    local_rank: int = 0
    """Among those of this machine."""
    local_processes: int = 1
    launched: bool = False

    @classmethod
    def of_this_process(cls) -> Self:
        """Raises UserError where a launcher said half of it."""
        if "WORLD_SIZE" not in os.environ:
            return cls()
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        try:
            rank, processes, local_rank, local_processes = (int(os.environ[n]) for n in names)
            return cls(rank, processes, local_rank, local_processes, launched=True)
        except (KeyError, ValueError) as error:
            raise UserError(
                f"A launcher sets {', '.join(names)} together, and here they are not all whole "
                "numbers; start kdbench with torchrun, or unset WORLD_SIZE."
            ) from error


@contextlib.contextmanager
def silent(quiet: bool) -> Iterator[None]:
    """Print nothing inside, so that of several processes one speaks; errors that leave it do."""
    if not quiet:
        yield
        return
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield


def end_with(parent: int) -> None:
    """End this process once the one that started it is gone; its killer may leave it no time."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(WATCH_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(STUCK_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
