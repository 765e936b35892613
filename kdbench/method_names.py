"""Names of methods, which are checked before slow imports."""

from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from kdbench.atomic import exists
from kdbench.errors import UserError, unknown_name_error
from kdbench.paths import built_in_files


def packaged_methods() -> dict[str, EntryPoint]:
    """Return the methods of installed packages, by name."""
    points = entry_points(group="kdbench.methods")
    return {point.name: point for point in sorted(points, key=lambda point: point.name)}


def method_names() -> list[str]:
    """Return the names of all methods that come with kdbench or are installed."""
    return list({**packaged_methods(), **built_in_files()})


def check_method_names(names: Iterable[str]) -> None:
    """Check that each name is a method, an existing file, or `all`.

    Raises:
        UserError: A name is unknown, or a file does not exist; the message suggests a similar name.
    """
    known = [*method_names(), "all"]
    for name in names:
        if name.endswith(".py"):
            if not exists(Path(name)):
                raise UserError(f"Method file '{name}' does not exist.")
        elif name not in known:
            file = f"./{name}.py"
            hint = f" For the file in this folder, write '{file}'." if Path(file).exists() else ""
            raise UserError(f"{unknown_name_error('method', name, method_names())}{hint}")
