"""What several commands share: options, and how they speak."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

from rich.console import Console
from typer import Option

from kdbench.errors import printable

RESULTS = Path("results")
RUNS = Path("runs")

ResultsDir = Annotated[Path, Option(help="Where results lie.")]


class Precision(StrEnum):
    """fp32 is TF32 on a GPU that has it."""

    fp32 = "fp32"
    bf16 = "bf16"


class Compile(StrEnum):
    """How training steps run."""

    auto = "auto"
    off = "off"
    inductor = "inductor"
    graph = "graph"
    both = "inductor+graph"


def names_of(text: str) -> list[str]:
    """Of a comma list."""
    return [name.strip() for name in text.split(",") if name.strip()]


def complain(message: str) -> None:
    """On standard error, in one line."""
    console = Console(stderr=True, soft_wrap=True)
    console.print(f"kdbench: {printable(message)}", markup=False, highlight=False)
