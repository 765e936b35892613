"""What several commands share: options, and how they speak."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

from rich.console import Console
from typer import Option

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
    Console(stderr=True, soft_wrap=True).print(f"kdbench: {message}", markup=False, highlight=False)
