"""What several commands share: options, and how they speak."""

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

ResultsDir = Annotated[Path, Option(help="Where results lie.")]
RunsDir = Annotated[Path, Option(help="Where checkpoints and logs are.")]
SuiteName = Annotated[str, Option(help="Name of a suite, or a TOML file.")]
Methods = Annotated[str, Option(help="Comma list of names or .py files, or 'all'.")]
DataDir = Annotated[
    Path | None, Option(help="Folder with the data set; default: $KDBENCH_DATA or the hub.")
]
Workers = Annotated[
    int | None, Option(help="Processes that decode images, where a suite's images stay encoded.")
]


class Precision(StrEnum):
    """fp32 is TF32 on a GPU that has it."""

    fp32 = "fp32"
    bf16 = "bf16"


class TableFormat(StrEnum):
    """How tables are printed that programs read too."""

    terminal = "terminal"
    markdown = "markdown"
    json = "json"


class Compile(StrEnum):
    """How training steps run."""

    auto = "auto"
    off = "off"
    inductor = "inductor"
    graph = "graph"
    both = "inductor+graph"


class WithLists(TyperCommand):
    """A command that takes comma lists, and options alone."""

    allow_extra_args = True  # so that it is this command that refuses them

    def invoke(self, ctx: Any) -> object:  # typer names no type for it
        """
        Raises:
            UserError: there is an argument, such as the rest of a list with a space in it.
        """
        if ctx.args:
            raise UserError(
                f"Unexpected '{ctx.args[0]}'; options begin with --, and a comma list has no "
                f"spaces: --methods ffsd,dml."
            )
        return super().invoke(ctx)


def names_of(text: str) -> list[str]:
    """Of a comma list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def methods_of(text: str) -> list[str]:
    """Of a comma list; a mistyped one is refused before anything is imported that takes long."""
    names = names_of(text)
    check_method_names(names)
    return names


def print_error(message: str) -> None:
    """On standard error, in one line."""
    console = Console(stderr=True, soft_wrap=True)
    console.print(f"kdbench: {printable(message)}", markup=False, highlight=False)


def report_damaged(damaged: "Sequence[DamagedFile]") -> bool:
    """Whether there was anything to complain of."""
    from kdbench.validation import sentence

    for item in damaged:
        print_error(sentence([f"'{item.file}' is not valid and was left out: {item.reason}"]))
    return bool(damaged)
