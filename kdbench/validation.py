"""Formatting of validation errors.

This is separate from `errors`, so that `kdbench --help` need not import pydantic.
"""

from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ValidationError

from kdbench.errors import suggest


def _folder_name(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise ValueError("must be a folder name without slashes and control characters")
    return name


FolderName = Annotated[str, AfterValidator(_folder_name)]
"""Text that is valid as the name of a single folder."""


def describe_problems(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Return one text per problem: its key, what is wrong, and a similar valid key if any."""
    return [_problem(item["loc"], item["type"], item["msg"], model) for item in error.errors()]


def join_problems(problems: Iterable[str]) -> str:
    """Return problems as one sentence."""
    text = "; ".join(problems)
    return text if text.endswith("?") else f"{text}."


def _problem(
    location: tuple[int | str, ...], kind: str, message: str, model: type[BaseModel]
) -> str:
    key = ".".join(map(str, location))
    if kind == "extra_forbidden":
        owners = " or ".join(f"'{name}'" for name in _sections_with_key(str(location[-1]), model))
        if owners:
            return f"unknown key '{key}': it belongs in {owners}"
        fields = _valid_keys(model, location)
        suggestion = suggest(str(location[-1]), fields)
        known = f" (known: {', '.join(fields)})" if fields else ""
        return f"unknown key '{key}'" + (f".{suggestion}" if suggestion else known)
    if kind == "missing":
        return f"'{key}' is missing"
    text = message.removeprefix("Value error, ")
    return f"{key}: {text[0].lower()}{text[1:]}" if key else text


def _valid_keys(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Return the keys that are valid in place of the last part of the location."""
    for part in location[:-1]:
        section = _sections(model).get(str(part))
        if section is None:
            return []
        model = section
    return list(model.model_fields)


def _sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Return the fields of a model that are models themselves."""
    return {
        name: field.annotation
        for name, field in model.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def _sections_with_key(key: str, model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return the paths of all sections, at any depth, that have a given key."""
    paths = []
    for name, section in _sections(model).items():
        path = f"{prefix}{name}"
        paths += [path] if key in section.model_fields else []
        paths += _sections_with_key(key, section, f"{path}.")
    return paths
