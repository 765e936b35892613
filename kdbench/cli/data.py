"""The `kdbench data` commands. Each command imports slow modules itself."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from typer import Option

from kdbench.cli.common import SuiteName, print_error
from kdbench.errors import UserError

if TYPE_CHECKING:
    from kdbench.data.prepare.manifest import Manifest

app = typer.Typer(help="Prepare datasets for training.", no_args_is_help=True)

MAX_LISTED_IMAGES = 5
"""Number of undecodable images that the terminal lists. The manifest lists all of them."""


@app.callback()
def data() -> None:
    """Prepare datasets for training."""


@app.command()
def prepare(
    output: Annotated[Path, Option(help="Folder for the prepared images.")],
    suite: SuiteName = "imagenet",
    data_dir: Annotated[
        Path | None, Option(help="Folder with the originals; default: $KDBENCH_DATA or the hub.")
    ] = None,
    workers: Annotated[
        int | None, Option(help="Number of decoding processes; default: one per core.")
    ] = None,
    dry_run: Annotated[bool, Option(help="Print images, size and time only.")] = False,
    check: Annotated[bool, Option("--check", help="Verify the prepared images and exit.")] = False,
) -> None:
    """Shrink a dataset's images once to the suite's evaluation size, for faster training."""
    if workers is not None and workers < 1:
        raise UserError(f"--workers must be at least 1, got {workers}.")
    if check:
        _check(output)
        return
    manifest = _prepare(suite, data_dir, output, workers, dry_run)
    if manifest is not None:
        _print_summary(manifest, output)
        print(f"Next: kdbench run --suite {suite} --data-dir {output}")


def _prepare(
    suite_name: str, data_dir: Path | None, output: Path, workers: int | None, dry_run: bool
) -> "Manifest | None":
    """Write the missing shards, or print the estimate and return None for a dry run."""
    from kdbench.data.prepare.prepare import (
        estimate,
        load_or_create_manifest,
        prepare,
        shorter_side,
    )
    from kdbench.data.sources.locate import locate
    from kdbench.launch.shares import cores
    from kdbench.suite.load import load_suite

    suite = load_suite(suite_name)
    side = shorter_side(suite)
    processes = workers or cores()
    with Console(stderr=True).status("inspecting the originals"):
        source = locate(suite.data, data_dir)
        manifest = load_or_create_manifest(source, side, output)
        expected = estimate(source, manifest, output, processes)
    if dry_run:
        print(expected.describe(manifest, output, processes))
        return None
    expected.check_disk(output)
    with _progress("preparing", manifest.originals.images) as advance:
        return prepare(source, manifest, output, processes, advance)


def _check(output: Path) -> None:
    from kdbench.data.prepare.manifest import read_manifest
    from kdbench.data.prepare.prepare import check_prepared

    manifest = read_manifest(output)
    with _progress("checking", manifest.images if manifest else 0) as advance:
        problems = check_prepared(output, advance)
    if problems:
        for problem in problems:
            print_error(problem)
        print_error(
            "Delete the corrupt files, then run the same command without --check to recreate them."
        )
        raise typer.Exit(1)
    print(f"'{output}' is complete and intact.")


def _print_summary(manifest: "Manifest", output: Path) -> None:
    from rich.filesize import decimal

    undecodable = manifest.undecodable()
    if undecodable:
        listed = ", ".join(
            f"{split} {index} ({reason})"
            for split, index, reason in undecodable[:MAX_LISTED_IMAGES]
        )
        rest = len(undecodable) - MAX_LISTED_IMAGES
        more = f" and {rest:,} more" if rest > 0 else ""
        print_error(
            f"{len(undecodable):,} images cannot be decoded and were copied unchanged: "
            f"{listed}{more}."
        )
    print(
        f"Prepared {manifest.images:,} images in '{output}': {decimal(manifest.bytes)}, "
        f"{manifest.settings}."
    )


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total)
        yield lambda count: progress.advance(task, count)
