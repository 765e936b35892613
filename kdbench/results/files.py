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
from kdbench.validation import describe_problems

MAX_RESULT_BYTES = 32 * 2**20
"""Maximum size of a result file in bytes. 300 epochs take less than 1 MiB."""

PROBE_BYTES = 4096
"""Size of the test file in bytes. A full disk may still accept empty files."""


@dataclass(frozen=True)
class DamagedFile:
    """A file in a results folder that is not a valid result."""

    file: Path
    reason: str


def result_path(results: Path, identity: Identity) -> Path:
    """Return the path of a run's result."""
    folder = results / identity.suite / identity.architecture / identity.method
    return folder / f"seed{identity.seed}.json"


def check_writable(folder: Path) -> None:
    """Check that a folder can be written to, before hours of training rather than after.

    Raises:
        UnwritableError: The folder cannot be created or written to.
    """
    probe = folder / f".kdbench-{os.getpid()}"
    with os_errors_as_user_errors(f"write to '{folder}'", "; fix that or choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with probe.open("wb") as stream:
                stream.write(bytes(PROBE_BYTES))
                stream.flush()
                os.fsync(stream.fileno())
        finally:
            probe.unlink(missing_ok=True)


def write_result(results: Path, result: Result) -> Path:
    """Write a result atomically and return its path.

    Raises:
        UnwritableError: The file cannot be written.
    """
    file = result_path(results, result.identity)
    text = json.dumps(result.model_dump(mode="json"), indent=1) + "\n"
    with atomic_write(file) as stream:
        stream.write(text.encode())
    return file


def read_result(file: Path) -> Result | DamagedFile:
    """Read and validate one result; return the reason if it is not valid."""
    try:
        return Result.model_validate_json(read_small_file(file), strict=True)
    except ValidationError as error:
        version = _newer_version(error)
        if version is not None:
            return DamagedFile(
                file,
                f"it was written by a newer kdbench (schema_version {version}; this version reads "
                f"{SCHEMA_VERSION}); update kdbench",
            )
        problems = describe_problems(error, Result)
        more = f" and {len(problems) - 1} more problems" if len(problems) > 1 else ""
        return DamagedFile(file, problems[0] + more)
    except OSError as error:
        return DamagedFile(file, error.strerror or str(error))


def read_small_file(file: Path) -> bytes:
    """Return the content of a regular file of at most MAX_RESULT_BYTES bytes.

    Raises:
        OSError: The file cannot be read, is larger, or is not a regular file.
    """
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file")
    if status.st_size > MAX_RESULT_BYTES:
        size = f"{status.st_size / 2**20:,.0f} MiB"
        limit = f"{MAX_RESULT_BYTES // 2**20} MiB"
        raise OSError(errno.EFBIG, f"it has {size}, which is more than the limit of {limit}")
    return file.read_bytes()


def _newer_version(error: ValidationError) -> int | None:
    """Return the schema version of a result that this kdbench is too old to read."""
    for problem in error.errors():
        found = problem["input"]
        if problem["loc"] == ("schema_version",) and isinstance(found, int):
            return found if found > SCHEMA_VERSION else None
    return None


def load_results(results: Path, suite: str | None = None) -> tuple[list[Result], list[DamagedFile]]:
    """Return the valid results of a folder, or of one suite in it, and the invalid files."""
    found = list(iter_results(results, suite))
    good = [item for item in found if isinstance(item, Result)]
    return good, [item for item in found if isinstance(item, DamagedFile)]


def iter_results(results: Path, suite: str | None = None) -> Iterator[Result | DamagedFile]:
    """Yield all results of a folder, or of one suite in it."""
    for file in _files(results, 3, suite):
        if isinstance(file, DamagedFile):
            yield file
            continue
        item = read_result(file)
        if isinstance(item, Result) and file != result_path(results, item.identity):
            expected = result_path(results, item.identity).relative_to(results)
            item = DamagedFile(file, f"it is the result that belongs at '{expected}'")
        yield item


def _files(folder: Path, depth: int, name: str | None = None) -> Iterator[Path | DamagedFile]:
    """Yield the result files `depth` folders below, and folders that cannot be listed.

    With a name, only the folder of that name is searched.
    """
    try:
        paths = sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):  # it may have been removed meanwhile
        return
    except OSError as error:
        yield DamagedFile(folder, error.strerror or str(error))
        return
    for path in paths:
        if depth and name in (None, path.name):
            yield from _files(path, depth - 1)
        elif not depth and path.match("seed*.json"):
            yield path
