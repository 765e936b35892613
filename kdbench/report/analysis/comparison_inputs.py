"""What two sides of a comparison may be: results folders, git revisions of one, or methods."""

import io
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from kdbench.errors import UserError, nearest
from kdbench.results.files import DamagedFile, load_results
from kdbench.results.schema import Result


@dataclass(frozen=True)
class Side:
    """One side of a comparison."""

    name: str
    results: list[Result]
    is_method: bool = False


def read_sides(names: Sequence[str], results: Path) -> tuple[list[Side], list[DamagedFile]]:
    """The sides of these names, and files that are none of their results.

    A name is an existing folder, else a method with results in `results`, else a git revision of
    that folder, read without a checkout.

    Raises:
        UserError: a name is none of these, or they are not of one kind.
    """
    here, damaged_here = load_results(results)
    methods = {result.identity.method for result in here}
    sides, damaged = [], []
    for name in names:
        if Path(name).is_dir():
            found, bad = load_results(Path(name))
            sides.append(Side(name, found))
        elif name in methods:
            found, bad = [result for result in here if result.identity.method == name], damaged_here
            sides.append(Side(name, found, is_method=True))
        else:
            found, bad = _read_revision(name, results, methods)
            sides.append(Side(name, found))
        damaged += [item for item in bad if item not in damaged]
    of_methods = [side.name for side in sides if side.is_method]
    if of_methods and len(of_methods) < len(sides):
        others = ", ".join(f"'{side.name}'" for side in sides if not side.is_method)
        raise UserError(
            f"'{of_methods[0]}' is a method and {others} is none; compare two methods, or two "
            "results folders or git revisions."
        )
    for side in sides:
        if not side.results:
            raise UserError(f"'{side.name}' holds no results; `kdbench run` makes some.")
    return sides, damaged


def _read_revision(
    name: str, results: Path, methods: set[str]
) -> tuple[list[Result], list[DamagedFile]]:
    """Damaged files are named as git names them."""
    folder = results.resolve()
    existing = next(place for place in (folder, *folder.parents) if place.is_dir())
    root = _git(existing, "rev-parse", "--show-toplevel")
    commit = root and _git(
        existing, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}"
    )
    if not root or not commit:
        raise UserError(
            f"'{name}' is no folder, no method with results in '{results}' and no git revision."
            f"{nearest(name, methods)}"
        )
    top = Path(root.decode().strip())
    inside = folder.relative_to(top).as_posix()
    archive = _git(top, "archive", "--format=tar", commit.decode().strip(), "--", inside)
    if archive is None:
        raise UserError(f"Revision '{name}' has no folder '{inside}'; --results-dir names another.")
    with tempfile.TemporaryDirectory() as place, tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        try:
            tar.extractall(place, filter="data")
        except tarfile.TarError as error:  # a link out of the folder
            raise UserError(f"Revision '{name}' cannot be read: {error}.") from error
        good, damaged = load_results(Path(place) / inside)
        files = [item.file.relative_to(place).as_posix() for item in damaged]
    named = zip(damaged, files, strict=True)
    return good, [replace(item, file=Path(f"{name}:{file}")) for item, file in named]


def _git(folder: Path, *arguments: str) -> bytes | None:
    """What git says, or None where it is not there or says no."""
    try:
        said = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True)
    except OSError:
        return None
    return said.stdout if said.returncode == 0 else None
