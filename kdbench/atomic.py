"""Atomic writing of files."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from kdbench.errors import UnwritableError


@contextlib.contextmanager
def os_errors_as_user_errors(action: str, remedy: str = "") -> Iterator[None]:
    """Convert any OSError within this context to an error that the user can fix.

    Raises:
        UnwritableError: An OSError occurred; the message contains the action, reason and remedy.
    """
    try:
        yield
    except OSError as error:
        raise UnwritableError(action, error.strerror or str(error), remedy) from error


def exists(path: Path) -> bool:
    """Return True if a path exists, and False if its parent folder may not be read."""
    return os.access(path, os.F_OK)


@contextlib.contextmanager
def atomic_write(file: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """Return a context with a stream whose content atomically replaces a file at the end.

    On any error the old file remains unchanged and the temporary file is removed.

    Args:
        file: the file to write; its folder is created.
        durable: wait until the content is on disk, so that a power failure cannot lose it.

    Raises:
        UnwritableError: The file cannot be written.
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
    """Remove temporary files that killed processes left in a folder.

    No other process may be writing the files of this name.
    """
    for temporary in folder.glob(f".{name}.*.tmp"):
        with contextlib.suppress(OSError):
            temporary.unlink()
