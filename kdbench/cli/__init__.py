"""The command line. Each command parses, calls and prints; slow imports happen inside it."""

import os
from typing import Annotated

import typer

from kdbench import __version__
from kdbench.cli import bench, cluster, compare, data, export, gate, methods, report, run
from kdbench.cli.common import OptionsOnlyCommand, print_error
from kdbench.errors import PlanAbandonedError, PlanInterruptedError, UserError

app = typer.Typer(
    name="kdbench",
    help="Compare online knowledge-distillation methods on identical schedules.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(requested: bool) -> None:
    if requested:
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
    """Define the options before the subcommand. The help text comes from the app."""


app.command(cls=OptionsOnlyCommand)(run.run)
app.command(cls=OptionsOnlyCommand)(report.report)
app.command()(compare.compare)
app.command(cls=OptionsOnlyCommand)(bench.bench)
app.command(cls=OptionsOnlyCommand)(gate.gate)
app.command()(export.export)
app.command()(export.evaluate)
app.command()(methods.check)
app.command()(methods.new)
app.command(cls=OptionsOnlyCommand)(cluster.status)
app.command(cls=OptionsOnlyCommand)(cluster.cancel)
app.command(name="list")(report.list_)
app.add_typer(data.app, name="data")


SPIN_COUNT = "5000"
"""Number of iterations for which an idle OpenMP thread spins before it sleeps. The default of some
milliseconds wastes cores that other programs need, see docs/performance.md."""


def limit_thread_spinning() -> None:
    """Set the spin count of OpenMP threads unless the user did. Call before importing torch."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def main() -> None:
    """Run the command line. User errors become one sentence and exit code 2."""
    from kdbench.launch.place import Place, silent
    from kdbench.signals import exit_process

    limit_thread_spinning()
    prints = True
    try:
        place = Place.of_this_process()
        prints = place.local_rank == 0  # one process per machine prints
        with silent(not prints):
            app()
    except (UserError, PlanAbandonedError, PlanInterruptedError) as error:
        if prints:
            print_error(str(error))
        exit_process(error.exit_code)
