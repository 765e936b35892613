"""Results on disk: one JSON file per run, validated when read and written atomically.

The path is `results/<suite>/<architecture>/<method>/seed<k>.json`.
"""

import errno
import json
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from kdbench.atomic import atomic_write, os_errors_as_user_errors
from kdbench.results.schema import SCHEMA_VERSION, Identity, Result
from kdbench.validation import describe

LARGEST = 32 * 2**20
"""Bytes of a result; one of 300 epochs has less than 1 MiB."""

BLOCK = 4096
"""Bytes; a full disk may still have place for names of empty files."""


@dataclass(frozen=True)
class DamagedFile:
    """A file among the results that is not one."""

    file: Path
    reason: str


def result_path(results: Path, identity: Identity) -> Path:
    """Where a run's result lies."""
    folder = results / identity.suite / identity.architecture / identity.method
    return folder / f"seed{identity.seed}.json"


def check_writable(folder: Path) -> None:
    """Fail before hours of compute rather than after.

    Raises:
        UnwritableError: the folder cannot be made, or takes no block.
    """
    probe = folder / f".kdbench-{os.getpid()}"
    with os_errors_as_user_errors(f"write to '{folder}'", "; mend that, or choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with probe.open("wb") as stream:
                stream.write(bytes(BLOCK))
                stream.flush()
                os.fsync(stream.fileno())
        finally:
            probe.unlink(missing_ok=True)


def write_result(results: Path, result: Result) -> Path:
    """Write a result where it belongs, whole or not at all.

    Raises:
        UnwritableError: the folder or the disk does not take it.
    """
    file = result_path(results, result.identity)
    text = json.dumps(result.model_dump(mode="json"), indent=1) + "\n"
    with atomic_write(file) as stream:
        stream.write(text.encode())
    return file


def read_result(file: Path) -> Result | DamagedFile:
    """One result, or why the file is none. Numbers must be numbers: "70.0" is none."""
    try:
        return Result.model_validate_json(read_small_file(file), strict=True)
    except ValidationError as error:
        version = _newer_version(error)
        if version is not None:
            return DamagedFile(
                file,
                f"it was written by a newer kdbench (schema_version {version}, and this one reads "
                f"{SCHEMA_VERSION}); update kdbench",
            )
        problems = describe(error, Result)
        more = f" and {len(problems) - 1} more problems" if len(problems) > 1 else ""
        return DamagedFile(file, problems[0] + more)
    except OSError as error:
        return DamagedFile(file, error.strerror or str(error))


def read_small_file(file: Path) -> bytes:
    """The content of a regular file of at most LARGEST bytes.

    Raises:
        OSError: it cannot be read, is larger, or is a folder, a pipe or a device.
    """
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is no regular file")
    if status.st_size > LARGEST:
        size = f"{status.st_size / 2**20:,.0f} MiB"
        raise OSError(errno.EFBIG, f"it has {size}, and at most {LARGEST // 2**20} MiB are read")
    return file.read_bytes()


def _newer_version(error: ValidationError) -> int | None:
    """The schema version that a result says it has, where this kdbench is too old for it."""
    for problem in error.errors():
        found = problem["input"]
        if problem["loc"] == ("schema_version",) and isinstance(found, int):
            return found if found > SCHEMA_VERSION else None
    return None


def load_results(results: Path, suite: str | None = None) -> tuple[list[Result], list[DamagedFile]]:
    """What `read_all` finds, results apart from what is none."""
    found = list(iter_results(results, suite))
    good = [item for item in found if isinstance(item, Result)]
    return good, [item for item in found if isinstance(item, DamagedFile)]


def iter_results(results: Path, suite: str | None = None) -> Iterator[Result | DamagedFile]:
    """All results of a folder, or of one suite in it."""
    for file in _files(results, 3, suite):
        if isinstance(file, DamagedFile):
            yield file
            continue
        found = read_result(file)
        if isinstance(found, Result) and file != result_path(results, found.identity):
            place = result_path(results, found.identity).relative_to(results)
            found = DamagedFile(file, f"it is the result that belongs at '{place}'")
        yield found


def _files(folder: Path, depth: int, name: str | None = None) -> Iterator[Path | DamagedFile]:
    """Files of results so many folders below, of all or of the one named, and what cannot be
    listed.
    """
    try:
        found = sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):  # or it vanished meanwhile
        return
    except OSError as error:
        yield DamagedFile(folder, error.strerror or str(error))
        return
    for path in found:
        if depth and name in (None, path.name):
            yield from _files(path, depth - 1)
        elif not depth and path.match("seed*.json"):
            yield path
