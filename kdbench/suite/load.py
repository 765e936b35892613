"""Loading of suites by name, or from a TOML file."""

import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from kdbench.errors import UserError, unknown_name_error
from kdbench.paths import SUITES
from kdbench.suite.suite import Suite
from kdbench.validation import describe_problems, join_problems


def suite_files() -> dict[str, Path]:
    """Return the TOML files of the suites that come with kdbench, by name."""
    return {file.stem: file for file in sorted(SUITES.glob("*.toml"))}


def load_suite(name: str) -> Suite:
    """Load a suite by name, or from the path of its TOML file.

    Raises:
        UserError: The suite does not exist or is not valid; the message lists all problems.
    """
    try:
        file = _find(name)
        content = _merged(file, seen=())
    except OSError as error:
        raise UserError(f"Suite '{name}' cannot be read: {error.strerror or error}.") from None
    if "@" in file.stem:
        raise UserError(
            f"Suite '{file.name}' is not valid: its name must not contain '@', which marks changes "
            "made on the command line; rename the file."
        )
    if "name" in content:
        raise UserError(
            f"Suite '{file.name}' is not valid: remove 'name', because a suite is named after its "
            "file."
        )
    content.pop("extends", None)
    try:
        return Suite.model_validate({"name": file.stem} | content)
    except ValidationError as error:
        problems = join_problems(describe_problems(error, Suite))
        raise UserError(f"Suite '{file.name}' is not valid: {problems}") from None


def _find(name: str) -> Path:
    if name.endswith(".toml"):
        file = Path(name)
        if not file.is_file():
            raise UserError(f"Suite file '{name}' does not exist.")
        return file
    files = suite_files()
    if name not in files:
        raise unknown_name_error("suite", name, files)
    return files[name]


def _merged(file: Path, seen: tuple[Path, ...]) -> dict[str, Any]:
    """Return the content of a suite file, merged into that of the suite it extends."""
    if file.resolve() in seen:
        raise UserError(f"Suite '{file.name}' extends itself.")
    try:
        content = tomllib.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML, or nested too deeply
        raise UserError(f"Suite '{file.name}' is not valid TOML: {error}.") from None
    parent = content.get("extends")
    if parent is None:
        return content
    if not isinstance(parent, str):
        raise UserError(f"Suite '{file.name}' is not valid: 'extends' must name a suite.")
    sibling = file.parent / (parent if parent.endswith(".toml") else f"{parent}.toml")
    try:
        base = sibling if sibling.is_file() else _find(parent)
    except UserError as error:
        raise UserError(f"Suite '{file.name}' extends '{parent}': {error}") from None
    return _overlay(_merged(base, (*seen, file.resolve())), content)


def _overlay(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        merged[key] = _overlay(base[key], value) if both else value
    return merged


def all_suites() -> Iterator[Suite]:
    """Yield all suites that come with kdbench."""
    for name in suite_files():
        yield load_suite(name)
