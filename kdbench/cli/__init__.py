"""Commands: parse, call, print. What takes long to import is imported by the command."""

import os
from typing import Annotated

import typer

from kdbench import __version__
from kdbench.cli import bench, cluster, compare, data, export, gate, methods, report, run
from kdbench.cli.common import WithLists, print_error
from kdbench.errors import PlanAbandonedError, PlanInterruptedError, UserError

app = typer.Typer(
    name="kdbench",
    help="Compare online knowledge-distillation methods on identical schedules.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"kdbench {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """What the command takes before its subcommands."""


app.command(cls=WithLists)(run.run)
app.command(cls=WithLists)(report.report)
app.command()(compare.compare)
app.command(cls=WithLists)(bench.bench)
app.command(cls=WithLists)(gate.gate)
app.command()(export.export)
app.command()(export.evaluate)
app.command()(methods.check)
app.command()(methods.new)
app.command(cls=WithLists)(cluster.status)
app.command(cls=WithLists)(cluster.cancel)
app.command(name="list")(report.list_)
app.add_typer(data.app, name="data")


SPINS = "5000"
"""Turns for which a thread of torch on a CPU waits for others before it sleeps. By default some ms,
and beside other programs cores are spent on waiting: see docs/performance.md."""


def wait_for_threads_briefly() -> None:
    """Unless the user decides it. OpenMP reads it when torch is imported."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


def main() -> None:
    """Entry point: errors of the user become one sentence and exit code 2."""
    from kdbench.launch.place import Place, silent
    from kdbench.signals import leave

    wait_for_threads_briefly()
    speaks = True
    try:
        place = Place.of_this_process()
        speaks = place.local_rank == 0  # one of those that a launcher started on a machine
        with silent(not speaks):
            app()
    except (UserError, PlanAbandonedError, PlanInterruptedError) as error:
        if speaks:
            print_error(str(error))
        leave(error.exit_code)
