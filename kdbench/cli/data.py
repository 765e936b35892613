"""`kdbench data`: commands on data sets. What takes long to import is imported by the command."""

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

app = typer.Typer(help="Prepare data sets for training.", no_args_is_help=True)

NAMED = 5
"""Undecodable images that are named on the terminal; the manifest names all."""


@app.callback()
def data() -> None:
    """Prepare data sets for training."""


@app.command()
def prepare(
    output: Annotated[Path, Option(help="Folder for the prepared images.")],
    suite: SuiteName = "imagenet",
    data_dir: Annotated[
        Path | None, Option(help="Folder with the originals; default: $KDBENCH_DATA or the hub.")
    ] = None,
    workers: Annotated[
        int | None, Option(help="Processes that decode; default: one for each core.")
    ] = None,
    dry_run: Annotated[bool, Option(help="Print images, size and time only.")] = False,
    check: Annotated[bool, Option("--check", help="Verify what was prepared, and exit.")] = False,
) -> None:
    """Make a data set's images as small as the suite evaluates them, once, to train faster."""
    from rich.filesize import decimal

    from kdbench.data.prepare import prepare as work
    from kdbench.data.prepare.manifest import read_manifest
    from kdbench.data.sources.locate import locate
    from kdbench.launch.shares import cores
    from kdbench.suite.load import load_suite

    if workers is not None and workers < 1:
        raise UserError(f"--workers must be at least 1, got {workers}.")
    if check:
        manifest = read_manifest(output)
        with _progress("checking", manifest.images if manifest else 0) as advance:
            problems = work.check(output, advance)
        for problem in problems:
            print_error(problem)
        if problems:
            print_error(
                "Delete what is damaged, and the same command without --check makes it again."
            )
            raise typer.Exit(1)
        print(f"'{output}' is whole.")
        return
    chosen = load_suite(suite)
    side = work.shorter_side(chosen)
    processes = workers or cores()
    with Console(stderr=True).status("looking at the originals"):
        source = locate(chosen.data, data_dir)
        manifest = work.begin(source, side, output)
        expected = work.estimate(source, manifest, output, processes)
    if dry_run:
        print(expected.describe(manifest, output, processes))
        return
    expected.check_disk(output)
    with _progress("preparing", manifest.originals.images) as advance:
        manifest = work.prepare(source, manifest, output, processes, advance)
    _say_undecodable(manifest)
    print(
        f"Prepared {manifest.images:,} images in '{output}': {decimal(manifest.bytes)}, "
        f"{manifest.settings}."
    )
    print(f"Next: kdbench run --suite {suite} --data-dir {output}")


def _say_undecodable(manifest: "Manifest") -> None:
    bad = manifest.undecodable()
    if not bad:
        return
    named = ", ".join(f"{split} {index} ({reason})" for split, index, reason in bad[:NAMED])
    more = f" and {len(bad) - NAMED:,} more" if len(bad) > NAMED else ""
    print_error(f"{len(bad):,} images cannot be decoded and keep their bytes: {named}{more}.")


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (*Progress.get_default_columns()[:-1], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(what, total=total)
        yield lambda count: progress.advance(task, count)
