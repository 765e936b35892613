"""Discovery of methods: files in `methods/`, files the user names, and installed packages."""

import ast
import hashlib
import importlib.util
import inspect
import json
import re
import sys
import tokenize
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import EntryPoint
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

from kdbench.errors import UserError
from kdbench.method import ContractError, Method, MethodOptions
from kdbench.method_names import check_method_names, packaged_methods
from kdbench.paths import built_in_files
from kdbench.validation import describe_problems, join_problems


class BrokenMethodError(UserError):
    """Raised for a method that cannot be loaded; other methods are not affected."""


@dataclass(frozen=True)
class MethodEntry:
    """A method and where it comes from."""

    name: str
    method: type[Method]
    digest: str
    """Hash of its source without comments, docstrings and layout."""
    argument: str
    """Value of --methods that selects it: its name, or the path of its file."""

    @property
    def findable(self) -> bool:
        """True if the method can be selected by name, because it is built in or installed."""
        return self.argument == self.name

    def locate_error(self, error: BaseException) -> str:
        """Return the message of an error that the method caused, with file and line."""
        file = Path(inspect.getfile(self.method))
        line = error_line(error, file)
        if line is None and isinstance(error, ContractError):
            named = re.match(r"(\w+)\(\)", str(error))
            part = getattr(self.method, named[1], self.method) if named else self.method
            line = inspect.getsourcelines(part)[1]
        message = str(error) if isinstance(error, ContractError) else error_text(error)
        return message if line is None else f"{file.name}, line {line}: {message}"

    def options(self, settings: dict[str, str]) -> MethodOptions:
        """Return the options for `key=value` settings, converted to the types of the options.

        Raises:
            UserError: An option is unknown or a value is not valid; the message lists all problems.
        """
        try:
            return self.method.Options.model_validate_strings(settings)
        except ValidationError as error:
            problems = join_problems(describe_problems(error, self.method.Options))
            raise UserError(f"Options of method '{self.name}': {problems}") from None


def find_methods(
    names: list[str], on_broken: Callable[[BrokenMethodError], None] | None = None
) -> list[MethodEntry]:
    """Load methods.

    Args:
        names: names of methods, paths of .py files, or `all`.
        on_broken: called with the error of a method that cannot be loaded, which is then left out.
            By default the error is raised.

    Raises:
        UserError: A name is unknown, or a method cannot be loaded.
    """
    check_method_names(names)
    known = _loaders()
    requested: list[Callable[[], MethodEntry]] = []
    for name in names:
        if name == "all":
            requested += known.values()
        elif name.endswith(".py"):
            requested.append(partial(_load_user_file, Path(name), set(known)))
        else:
            requested.append(known[name])
    entries: dict[str, MethodEntry] = {}
    for load in requested:
        try:
            entry = load()
            if entries.setdefault(entry.name, entry) != entry:
                raise BrokenMethodError(f"Two methods are named '{entry.name}'; rename a file.")
        except BrokenMethodError as error:
            if on_broken is None:
                raise
            on_broken(error)
    return list(entries.values())


def _loaders() -> dict[str, Callable[[], MethodEntry]]:
    """Return the functions that load each built-in or installed method."""
    built_in = {name: partial(load_file, file) for name, file in built_in_files().items()}
    packaged = packaged_methods().items()
    installed = {name: partial(_load_from_package, point) for name, point in packaged}
    return {**installed, **built_in}


def load_file(
    file: Path, module_name: str | None = None, argument: str | None = None
) -> MethodEntry:
    """Load the method that a file defines.

    Raises:
        UserError: The file cannot be imported, or does not define exactly one method.
    """
    module = _import(file, module_name or f"kdbench.methods.{file.stem}")
    classes = [
        item
        for item in vars(module).values()
        if inspect.isclass(item) and issubclass(item, Method) and item.__module__ == module.__name__
    ]
    found = [cls for cls in classes if not inspect.isabstract(cls)]
    if not found and classes:
        missing = " and ".join(f"{name}()" for name in sorted(classes[0].__abstractmethods__))
        line = inspect.getsourcelines(classes[0])[1]
        raise BrokenMethodError(
            f"{file.name}, line {line}: {classes[0].__name__} does not define {missing}."
        )
    if not found:
        raise BrokenMethodError(
            f"{file.name} defines no method; define a class that derives from "
            "kdbench.method.Method."
        )
    if len(found) > 1:
        names = " and ".join(cls.__name__ for cls in found)
        line = inspect.getsourcelines(found[1])[1]
        raise BrokenMethodError(
            f"{file.name}, line {line}: the file defines several methods ({names}); keep one."
        )
    with tokenize.open(file) as source:  # in the encoding that the file declares
        digest = source_digest(source.read())
    return _check_options(MethodEntry(file.stem, found[0], digest, argument or file.stem))


def _load_from_package(point: EntryPoint) -> MethodEntry:
    """Load a method from an installed package."""
    try:
        method = point.load()
        source = inspect.getsource(sys.modules[method.__module__])
    except Exception as error:  # a package may raise anything while it is imported
        reason = error_text(error)
        raise BrokenMethodError(
            f"Entry point '{point.name}' cannot be loaded: {reason}."
        ) from error
    if not (inspect.isclass(method) and issubclass(method, Method)):
        raise BrokenMethodError(
            f"Entry point '{point.name}' of group {point.group} is not a Method class."
        )
    entry = MethodEntry(point.name, method, source_digest(source), argument=point.name)
    return _check_options(entry)


def _check_options(entry: MethodEntry) -> MethodEntry:
    """Return the entry after checking that its options are valid and have defaults."""
    options = entry.method.Options
    try:
        if not issubclass(options, MethodOptions):
            raise BrokenMethodError(f"{entry.name}: Options must derive from MethodOptions.")
        options()
    except ValidationError as error:
        problems = join_problems(describe_problems(error, options))
        raise BrokenMethodError(
            f"{entry.name}: every option needs a default: {problems}"
        ) from error
    return entry


def source_digest(source: str) -> str:
    """Return a hash of source code that ignores comments, docstrings and layout."""
    text = json.dumps(_canonical(ast.parse(source)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _canonical(node: Any) -> Any:
    """Return an AST as nested lists, without docstrings and without empty fields.

    Empty fields differ between Python versions.
    """
    if isinstance(node, list):
        return [_canonical(item) for item in node if not _is_docstring(item)]
    if isinstance(node, ast.AST):
        fields = [(name, _canonical(value)) for name, value in ast.iter_fields(node)]
        return [type(node).__name__, [pair for pair in fields if pair[1] not in (None, [])]]
    return node if isinstance(node, (str, int, float, bool, type(None))) else repr(node)


def _is_docstring(node: Any) -> bool:
    return (
        isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    )


def _load_user_file(file: Path, existing: set[str]) -> MethodEntry:
    if file.stem in existing:
        raise BrokenMethodError(
            f"Method file '{file}': a method named '{file.stem}' already exists; rename the file."
        )
    # The path must be absolute, as in tracebacks, so that error_line() finds the file.
    return load_file(file.resolve(), f"kdbench_user_methods.{file.stem}", argument=str(file))


def _import(file: Path, name: str) -> ModuleType:
    loaded = sys.modules.get(name)
    if loaded is not None and loaded.__file__ and Path(loaded.__file__).samefile(file):
        return loaded
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        sys.modules.pop(name, None)
        if isinstance(error, SyntaxError):
            line, text = error.lineno or 1, error.msg
        else:
            line, text = error_line(error, file) or 1, error_text(error)
        raise BrokenMethodError(f"{file.name}, line {line}: {text}.") from error
    return module


def error_line(error: BaseException, file: Path) -> int | None:
    """Return the last line of a file in an error's traceback, or None."""
    line = None
    trace = error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename) == file:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def error_text(error: BaseException) -> str:
    """Return the kind and the message of an error."""
    return f"{type(error).__name__}: {error}".rstrip(".: ")
