"""Runs whose process died: what to make of its end, and a result that says so."""

import signal
from pathlib import Path

from kdbench.engine.device import make_accelerator
from kdbench.engine.outcome import empty_result
from kdbench.engine.spec import RunSpec
from kdbench.launch.execution import without_paths
from kdbench.launch.order import WorkOrder
from kdbench.launch.status import change_status
from kdbench.store import Result, save

OURS = "kdbench: "
"""Begins what kdbench says, among what others print."""


def record_death(order: WorkOrder, spec: RunSpec, reason: str, threads: int) -> Result:
    """Write the failed result of a run whose process could not; it had that many threads.

    Raises:
        UserError: the folder cannot be written.
    """
    told = without_paths(reason), order.how.processes
    result = empty_result(spec, make_accelerator(), "failed", *told)
    environment = result.environment.model_copy(update={"threads": threads})
    result = result.model_copy(update={"environment": environment})
    save(order.how.results, result)
    change_status(order.folder, "failed", reason)
    return result


def how_it_ended(code: int, log: Path) -> str:
    """In words; a code is negative for a signal, as in `subprocess`."""
    if code < 0:
        names = {number.value: number.name for number in signal.Signals}
        return f"its process was killed by {names.get(-code, f'signal {-code}')}"
    last = last_words(log)
    if last.startswith(OURS):
        return last.removeprefix(OURS)
    return f"its process ended with code {code} and no result" + (f": {last}" if last else "")


def last_words(log: Path) -> str:
    """The last sentence of kdbench's that a process said, else its last line."""
    text = log.read_text(encoding="utf-8", errors="replace")
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    said = [line for line in lines if line.startswith(OURS)]
    return (said or lines or [""])[-1]
