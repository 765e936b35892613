"""The `kdbench check` and `kdbench new` commands. Slow imports happen inside the commands."""

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
        list[str] | None,
        Argument(metavar="[METHOD or FILE.py]...", help="Method names or .py files."),
    ] = None,
    all_: Annotated[bool, Option("--all", help="Check all methods.")] = False,
) -> None:
    """Check that methods keep the contract, on the CPU and without data."""
    if bool(methods) == all_:
        raise UserError("Name methods or files to check, or use --all.")
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
    """Create a working one-file method in the current folder, as a starting point."""
    from kdbench.scaffold import write_method

    file = write_method(name, Path(), set(method_names()))
    print(f"Wrote {file}. Next: kdbench check ./{file}")
    print(f"               then: kdbench run --methods ./{file},baseline")
    print("After editing it, use --overwrite-stale to replace the results of the old version.")
