"""Options and functions that several commands share."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from rich.console import Console
from typer import Option
from typer.core import TyperCommand

from kdbench.errors import UserError, printable
from kdbench.method_names import check_method_names

if TYPE_CHECKING:
    from kdbench.results.files import DamagedFile

RESULTS = Path("results")
RUNS = Path("runs")

ResultsDir = Annotated[Path, Option(help="Folder of results.")]
RunsDir = Annotated[Path, Option(help="Folder of checkpoints and logs.")]
SuiteName = Annotated[str, Option(help="Name of a suite, or a TOML file.")]
Methods = Annotated[
    str, Option(help="Comma-separated list of method names or .py files, or 'all'.")
]
DataDir = Annotated[
    Path | None, Option(help="Folder of the dataset. Default: $KDBENCH_DATA or the hub.")
]
Workers = Annotated[
    int | None, Option(help="Number of processes that decode images, for suites of encoded images.")
]


class Precision(StrEnum):
    """Precision of training; fp32 means TF32 on GPUs that support it."""

    fp32 = "fp32"
    bf16 = "bf16"


class TableFormat(StrEnum):
    """Output format of tables."""

    terminal = "terminal"
    markdown = "markdown"
    json = "json"


class Compile(StrEnum):
    """Way of running training steps."""

    auto = "auto"
    off = "off"
    inductor = "inductor"
    graph = "graph"
    both = "inductor+graph"


class OptionsOnlyCommand(TyperCommand):
    """A command with options but no arguments, some of which are comma-separated lists."""

    allow_extra_args = True  # they are rejected below, with a better message than Typer's

    def invoke(self, ctx: Any) -> object:  # typer does not export the type of the context
        """Run the command.

        Raises:
            UserError: There is an argument, such as the rest of a list with a space in it.
        """
        if ctx.args:
            raise UserError(
                f"Unexpected argument '{ctx.args[0]}'. Options begin with --, and lists have no "
                "spaces: --methods ffsd,dml."
            )
        return super().invoke(ctx)


def split_names(text: str) -> list[str]:
    """Return the names in a comma-separated list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def split_method_names(text: str) -> list[str]:
    """Return the method names in a comma-separated list, after checking that they exist."""
    names = split_names(text)
    check_method_names(names)
    return names


def print_error(message: str) -> None:
    """Print a message to standard error, on one line."""
    console = Console(stderr=True, soft_wrap=True)
    console.print(f"kdbench: {printable(message)}", markup=False, highlight=False)


def report_damaged(damaged: "Sequence[DamagedFile]") -> bool:
    """Report files that are not valid results; return True if there are any."""
    from kdbench.validation import join_problems

    for item in damaged:
        print_error(join_problems([f"'{item.file}' is not valid and was skipped: {item.reason}"]))
    return bool(damaged)
