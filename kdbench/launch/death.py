"""Runs whose process died, or could not write: what to make of it, and a result that says so."""

import contextlib
import os
import signal
from pathlib import Path

from kdbench.engine.device import make_accelerator
from kdbench.engine.result_builder import empty_result
from kdbench.engine.spec import RunSpec
from kdbench.errors import UnwritableError
from kdbench.launch.execution import Execution, run_folder, without_paths
from kdbench.launch.order import WorkOrder
from kdbench.launch.status import leave_word
from kdbench.results.files import write_result
from kdbench.results.schema import Result

OURS = "kdbench: "
"""Begins what kdbench says, among what others print."""

UNWRITABLE = os.EX_IOERR
"""Exit code of a process whose files, its words among them, the disk does not take."""


def record_death(order: WorkOrder, spec: RunSpec, reason: str, threads: int) -> Result:
    """The failed result of a run whose process could not write it; it had that many threads."""
    return _failed(spec, order.how, reason, threads=threads)


def record_unwritable(spec: RunSpec, how: Execution, error: UnwritableError) -> Result:
    """The failed result of a run that the disk does not take, or whose result it does not."""
    return _failed(spec, how, str(error).removesuffix("."))


def _failed(spec: RunSpec, how: Execution, reason: str, **environment: int) -> Result:
    """It is told in any case, and written where the disk takes it."""
    accelerator = make_accelerator(deterministic=how.deterministic)  # this process may train on
    result = empty_result(spec, accelerator, "failed", without_paths(reason), how.processes)
    told = result.environment.model_copy(update=environment)
    result = result.model_copy(update={"environment": told})
    with contextlib.suppress(UnwritableError):
        write_result(how.results, result)
    leave_word(run_folder(how.runs, spec), "failed", reason)
    return result


def how_it_ended(code: int, log: Path) -> str:
    """In words; a code is negative for a signal, as in `subprocess`."""
    if code < 0:
        names = {number.value: number.name for number in signal.Signals}
        return f"its process was killed by {names.get(-code, f'signal {-code}')}"
    last = last_words(log)
    if last.startswith(OURS):
        return last.removeprefix(OURS).removesuffix(".")
    if code == UNWRITABLE:
        return "the disk does not take its files"
    return f"its process ended with code {code} and no result" + (f": {last}" if last else "")


def last_words(log: Path) -> str:
    """The last sentence of kdbench's that a process said, else its last line."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    said = [line for line in lines if line.startswith(OURS)]
    return (said or lines or [""])[-1]
