"""Inputs of a comparison: results folders, git revisions of one, or methods."""

import io
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kdbench.errors import UserError, suggest
from kdbench.results.files import DamagedFile, load_results
from kdbench.results.schema import Result


@dataclass(frozen=True)
class ComparisonInput:
    """One of the two inputs of a comparison."""

    name: str
    results: list[Result]
    is_method: bool = False


def read_comparison_inputs(
    names: Sequence[str], results: Path
) -> tuple[list[ComparisonInput], list[DamagedFile]]:
    """Read the inputs of a comparison, and the invalid files among them.

    Args:
        names: existing folders, methods with results in `results`, or git revisions of that
            folder, which are read without a checkout.
        results: the results folder.

    Raises:
        UserError: A name is none of these, the inputs are of different kinds, or one is empty.
    """
    here, damaged_here = load_results(results)
    methods = {result.identity.method for result in here}
    inputs, damaged = [], []
    for name in names:
        if Path(name).is_dir():
            found, bad = load_results(Path(name))
            inputs.append(ComparisonInput(name, found))
        elif name in methods:
            found, bad = [result for result in here if result.identity.method == name], damaged_here
            inputs.append(ComparisonInput(name, found, is_method=True))
        else:
            found, bad = _read_revision(name, results, methods)
            inputs.append(ComparisonInput(name, found))
        damaged += [item for item in bad if item not in damaged]
    of_methods = [entry.name for entry in inputs if entry.is_method]
    if of_methods and len(of_methods) < len(inputs):
        others = ", ".join(f"'{entry.name}'" for entry in inputs if not entry.is_method)
        raise UserError(
            f"'{of_methods[0]}' is a method but {others} is not; compare two methods, or two "
            "results folders or git revisions."
        )
    for entry in inputs:
        if not entry.results:
            raise UserError(f"'{entry.name}' has no results; train some with `kdbench run`.")
    return inputs, damaged


def _read_revision(
    name: str, results: Path, methods: set[str]
) -> tuple[list[Result], list[DamagedFile]]:
    """Read the results of a git revision; damaged files are named `revision:path`."""
    folder = results.resolve()
    existing = next(place for place in (folder, *folder.parents) if place.is_dir())
    root = _git(existing, "rev-parse", "--show-toplevel")
    commit = root and _git(
        existing, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}"
    )
    if not root or not commit:
        raise UserError(
            f"'{name}' is neither a folder, nor a method with results in '{results}', nor a git "
            f"revision.{suggest(name, methods)}"
        )
    top = Path(root.decode().strip())
    inside = folder.relative_to(top).as_posix()
    archive = _git(top, "archive", "--format=tar", commit.decode().strip(), "--", inside)
    if archive is None:
        raise UserError(
            f"Revision '{name}' has no folder '{inside}'; name another with --results-dir."
        )
    with tempfile.TemporaryDirectory() as place, tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        try:
            tar.extractall(place, filter="data")
        except tarfile.TarError as error:  # for instance a link to a file outside the folder
            raise UserError(f"Revision '{name}' cannot be read: {error}.") from error
        good, damaged = load_results(Path(place) / inside)
        files = [item.file.relative_to(place).as_posix() for item in damaged]
    named = zip(damaged, files, strict=True)
    return good, [replace(item, file=Path(f"{name}:{file}")) for item, file in named]


def _git(folder: Path, *arguments: str) -> bytes | None:
    """Return the output of a git command, or None if it fails or git is not installed."""
    try:
        process = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True)
    except OSError:
        return None
    return process.stdout if process.returncode == 0 else None
