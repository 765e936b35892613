"""Failed validations in words. Apart from `errors`: `kdbench --help` has no time for pydantic."""

from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ValidationError

from kdbench.errors import nearest


def _folder_name(name: str) -> str:
    if name in ("", ".", "..") or "/" in name or "\\" in name or not name.isprintable():
        raise ValueError("must name one folder, without slashes and control characters")
    return name


FolderName = Annotated[str, AfterValidator(_folder_name)]


def describe(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """Every problem of a failed validation: its key, what is wrong, the nearest right key."""
    return [_problem(item["loc"], item["type"], item["msg"], model) for item in error.errors()]


def sentence(problems: Iterable[str]) -> str:
    """Problems as one text that ends in one mark."""
    text = "; ".join(problems)
    return text if text.endswith("?") else f"{text}."


def _problem(
    location: tuple[int | str, ...], kind: str, message: str, model: type[BaseModel]
) -> str:
    key = ".".join(map(str, location))
    if kind == "extra_forbidden":
        homes = " or ".join(f"'{section}'" for section in _sections_with(str(location[-1]), model))
        if homes:
            return f"unknown key '{key}': it belongs in {homes}"
        fields = _fields(model, location)
        near = nearest(str(location[-1]), fields)
        known = f" (known: {', '.join(fields)})" if fields else ""
        return f"unknown key '{key}'" + (f".{near}" if near else known)
    if kind == "missing":
        return f"'{key}' is missing"
    text = message.removeprefix("Value error, ")
    return f"{key}: {text[0].lower()}{text[1:]}" if key else text


def _fields(model: type[BaseModel], location: tuple[int | str, ...]) -> list[str]:
    """Names that would be right where the last part of the location stands."""
    for part in location[:-1]:
        section = _sections(model).get(str(part))
        if section is None:
            return []
        model = section
    return list(model.model_fields)


def _sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    """Its fields that are models themselves."""
    return {
        name: field.annotation
        for name, field in model.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
    }


def _sections_with(key: str, model: type[BaseModel], above: str = "") -> list[str]:
    """Those, of all depths, that have this very key."""
    found = []
    for name, section in _sections(model).items():
        path = f"{above}{name}"
        found += [path] if key in section.model_fields else []
        found += _sections_with(key, section, f"{path}.")
    return found
