"""Names of methods: a mistyped one is refused before anything that takes long is imported."""

from collections.abc import Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from kdbench.atomic import exists
from kdbench.errors import UserError, unknown
from kdbench.paths import built_in_files


def packaged_methods() -> dict[str, EntryPoint]:
    """Those of installed packages, by name."""
    points = entry_points(group="kdbench.methods")
    return {point.name: point for point in sorted(points, key=lambda point: point.name)}


def method_names() -> list[str]:
    """Names of all methods that ship or are installed."""
    return list({**packaged_methods(), **built_in_files()})


def check_method_names(names: Iterable[str]) -> None:
    """Refuse a name that is no method's and not `all`, and a file that is not there.

    Raises:
        UserError: with the nearest name that exists.
    """
    known = [*method_names(), "all"]
    for name in names:
        if name.endswith(".py"):
            if not exists(Path(name)):
                raise UserError(f"Method file '{name}' does not exist.")
        elif name not in known:
            file = f"./{name}.py"
            hint = f" For the file in this folder write '{file}'." if Path(file).exists() else ""
            raise UserError(f"{unknown('method', name, method_names())}{hint}")
