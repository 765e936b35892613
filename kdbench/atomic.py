"""Files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from kdbench.errors import UnwritableError


@contextlib.contextmanager
def os_errors_as_user_errors(what: str, remedy: str = "") -> Iterator[None]:
    """Inside, the disk is asked for something: that it does not give it is the user's to mend.

    Raises:
        UnwritableError: what could not be done, why, and a remedy if there is one.
    """
    try:
        yield
    except OSError as error:
        raise UnwritableError(what, error.strerror or str(error), remedy) from error


def exists(path: Path) -> bool:
    """Whether it is there; not where it may not be looked for."""
    return os.access(path, os.F_OK)


@contextlib.contextmanager
def atomic_write(file: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """A stream whose content replaces the file at the end, in one step, once it is on the disk.

    Whatever goes wrong before leaves the old file as it was and nothing beside it. What is not
    `durable` does not wait for the disk, and a power cut may lose it.

    Raises:
        UnwritableError: the folder or the disk does not take it.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        with os_errors_as_user_errors(f"write '{file}'"):
            file.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as stream:
                yield stream
                stream.flush()
                if durable:
                    os.fsync(stream.fileno())
            temporary.replace(file)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_temp_files(folder: Path, name: str = "*") -> None:
    """Remove what killed processes left of a file, or of all in a folder; no other may be at it."""
    for left in folder.glob(f".{name}.*.tmp"):
        with contextlib.suppress(OSError):
            left.unlink()
