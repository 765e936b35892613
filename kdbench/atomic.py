"""Files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from kdbench.errors import UserError


@contextlib.contextmanager
def written_whole(file: Path, durable: bool = True) -> Iterator[BinaryIO]:
    """A stream whose content replaces the file at the end, in one step, once it is on the disk.

    Whatever goes wrong before leaves the old file as it was and nothing beside it. What is not
    `durable` does not wait for the disk, and a power cut may lose it.

    Raises:
        UserError: the folder or the disk does not take it.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            yield stream
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        temporary.replace(file)
    except OSError as error:
        raise UserError(f"Cannot write '{file}': {error.strerror or error}.") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
