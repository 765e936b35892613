"""Commands for those who write methods. What takes long to import is imported by the command."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from typer import Argument, Option

from kdbench.cli.common import print_error
from kdbench.errors import UserError
from kdbench.method_names import check_method_names, method_names


def check(
    methods: Annotated[
        list[str] | None, Argument(metavar="[METHOD or FILE.py]...", help="Names or .py files.")
    ] = None,
    all_: Annotated[bool, Option("--all", help="Every method that is found.")] = False,
) -> None:
    """Test methods against the contract, on the CPU, without data."""
    if bool(methods) == all_:
        raise UserError("Name methods or files to check, or give --all.")
    check_method_names(methods or [])
    from kdbench.check.command import check_methods, format_table
    from kdbench.discovery import find_methods

    broken: list[UserError] = []
    entries = find_methods(["all"] if all_ else methods or [], broken.append)
    with Console(stderr=True).status("checking") as status:
        outcomes = check_methods(entries, on_check=status.update)
    if outcomes:
        print(format_table(outcomes))
    for error in broken:
        print_error(str(error))
    if broken or any(outcome.result == "FAILED" for outcome in outcomes):
        raise typer.Exit(1)


def new(
    name: Annotated[str, Argument(help="Name of the method; the file is NAME.py.")],
) -> None:
    """Write a working one-file method to start from, in this folder."""
    from kdbench.scaffold import write_method

    file = write_method(name, Path(), set(method_names()))
    print(f"Wrote {file}. Next: kdbench check ./{file}")
    print(f"               then: kdbench run --methods ./{file},baseline")
    print("Once it is edited, --overwrite-stale lets its new version replace its results.")
