"""How methods are found: the files in `methods/`, a file the user names, installed packages."""

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
    """A method file that cannot be used; other methods can."""


@dataclass(frozen=True)
class MethodEntry:
    """A method as it was found."""

    name: str
    method: type[Method]
    digest: str
    """Hash of its source without comments, docstrings and layout."""
    argument: str
    """What finds it again: its name, or the path of its file."""

    @property
    def findable(self) -> bool:
        """Whether its name alone finds it: it ships with kdbench or an installed package."""
        return self.argument == self.name

    def blame(self, error: BaseException) -> str:
        """`file, line: what` for an error that arose in the method, or through it."""
        file = Path(inspect.getfile(self.method))
        line = error_line(error, file)
        if line is None and isinstance(error, ContractError):
            named = re.match(r"(\w+)\(\)", str(error))
            part = getattr(self.method, named[1], self.method) if named else self.method
            line = inspect.getsourcelines(part)[1]
        what = str(error) if isinstance(error, ContractError) else error_text(error)
        return what if line is None else f"{file.name}, line {line}: {what}"

    def options(self, settings: dict[str, str]) -> MethodOptions:
        """Options from `key=value` settings, read by the type of each option.

        Raises:
            UserError: an unknown option or a wrong value; all of them at once.
        """
        try:
            return self.method.Options.model_validate_strings(settings)
        except ValidationError as error:
            problems = join_problems(describe_problems(error, self.method.Options))
            raise UserError(f"Options of method '{self.name}': {problems}") from None


def find_methods(
    names: list[str], on_broken: Callable[[BrokenMethodError], None] | None = None
) -> list[MethodEntry]:
    """Methods by name, by the path of a file, or `all`.

    With `on_broken`, a file that cannot be used is told and left out; else it is an error.

    Raises:
        UserError: an unknown name, or a file that holds no method.
    """
    check_method_names(names)
    known = _finders()
    wanted: list[Callable[[], MethodEntry]] = []
    for name in names:
        if name == "all":
            wanted += known.values()
        elif name.endswith(".py"):
            wanted.append(partial(_from_user, Path(name), set(known)))
        else:
            wanted.append(known[name])
    entries: dict[str, MethodEntry] = {}
    for find in wanted:
        try:
            entry = find()
            if entries.setdefault(entry.name, entry) != entry:
                raise BrokenMethodError(f"Two methods are named '{entry.name}'; rename a file.")
        except BrokenMethodError as error:
            if on_broken is None:
                raise
            on_broken(error)
    return list(entries.values())


def _finders() -> dict[str, Callable[[], MethodEntry]]:
    """How to load each method that ships or is installed."""
    shipped = {name: partial(load_file, file) for name, file in built_in_files().items()}
    packaged = packaged_methods().items()
    installed = {name: partial(_from_package, point) for name, point in packaged}
    return {**installed, **shipped}


def load_file(
    file: Path, module_name: str | None = None, argument: str | None = None
) -> MethodEntry:
    """The one method that a file defines.

    Raises:
        UserError: the file cannot be imported, or defines no method or several.
    """
    module = _import(file, module_name or f"kdbench.methods.{file.stem}")
    classes = [
        item
        for item in vars(module).values()
        if inspect.isclass(item) and issubclass(item, Method) and item.__module__ == module.__name__
    ]
    found = [cls for cls in classes if not inspect.isabstract(cls)]
    if not found and classes:
        lacks = " and ".join(f"{name}()" for name in sorted(classes[0].__abstractmethods__))
        line = inspect.getsourcelines(classes[0])[1]
        raise BrokenMethodError(f"{file.name}, line {line}: {classes[0].__name__} lacks {lacks}.")
    if not found:
        raise BrokenMethodError(
            f"{file.name}: no method: define a class that derives from kdbench's Method."
        )
    if len(found) > 1:
        names = " and ".join(cls.__name__ for cls in found)
        line = inspect.getsourcelines(found[1])[1]
        raise BrokenMethodError(
            f"{file.name}, line {line}: two methods ({names}); a file holds one."
        )
    with tokenize.open(file) as source:  # in the encoding that it says it has
        digest = source_digest(source.read())
    return _checked(MethodEntry(file.stem, found[0], digest, argument or file.stem))


def _from_package(point: EntryPoint) -> MethodEntry:
    """A method that an installed package brings."""
    try:
        method = point.load()
        source = inspect.getsource(sys.modules[method.__module__])
    except Exception as error:  # a package may raise anything while it is imported
        what = error_text(error)
        raise BrokenMethodError(f"Entry point '{point.name}' cannot be loaded: {what}.") from error
    if not (inspect.isclass(method) and issubclass(method, Method)):
        raise BrokenMethodError(
            f"Entry point '{point.name}' of group {point.group} is not a Method class."
        )
    return _checked(MethodEntry(point.name, method, source_digest(source), argument=point.name))


def _checked(entry: MethodEntry) -> MethodEntry:
    """The entry, if its options are options with defaults."""
    options = entry.method.Options
    try:
        if not issubclass(options, MethodOptions):
            raise BrokenMethodError(f"{entry.name}: Options must derive from MethodOptions.")
        options()
    except ValidationError as error:
        what = join_problems(describe_problems(error, options))
        raise BrokenMethodError(f"{entry.name}: every option needs a default: {what}") from error
    return entry


def source_digest(source: str) -> str:
    """Hash of what the source does: comments, docstrings and layout do not count."""
    text = json.dumps(_canonical(ast.parse(source)))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _canonical(node: Any) -> Any:
    """An AST as lists, without empty fields (Python versions differ in those) and docstrings."""
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


def _from_user(file: Path, taken: set[str]) -> MethodEntry:
    if file.stem in taken:
        raise BrokenMethodError(
            f"Method file '{file}': the name '{file.stem}' is taken; rename the file."
        )
    # Absolute, as in the tracebacks that say in which line an error arose.
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
    except SyntaxError as error:
        raise BrokenMethodError(f"{file.name}, line {error.lineno or 1}: {error.msg}.") from error
    except (Exception, SystemExit) as error:  # a user's file may raise anything
        line = error_line(error, file) or 1
        raise BrokenMethodError(f"{file.name}, line {line}: {error_text(error)}.") from error
    return module


def error_line(error: BaseException, file: Path) -> int | None:
    """Last line of the file that an error passed through."""
    line = None
    trace = error.__traceback__
    while trace is not None:
        if Path(trace.tb_frame.f_code.co_filename) == file:
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


def error_text(error: BaseException) -> str:
    """`Kind: message` of an error."""
    return f"{type(error).__name__}: {error}".rstrip(".: ")
