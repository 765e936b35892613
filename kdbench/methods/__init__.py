"""The methods that ship with kdbench, importable by class: `from kdbench.methods import FFSD`.

The method files live in the top-level folder `methods/` of the repository and in this package in a
wheel. `__path__` points to wherever they are, so `kdbench.methods.ffsd` is the same module in both.
"""

from typing import Any

from kdbench.paths import METHODS, built_in_files

__path__ = [str(METHODS)]


def __getattr__(name: str) -> Any:
    """Return the method class with the given name; its module is imported on first use."""
    from kdbench.discovery import load_file

    for file in built_in_files().values():
        method = load_file(file).method
        if method.__name__ == name:
            return method
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
