"""The plan as a table, for `--dry-run`."""

from datetime import timedelta

from tabulate import tabulate

from kdbench.data import Source, batch_share
from kdbench.engine.checkpoint import read_saved_steps
from kdbench.engine.compile_mode import resolve_compile_mode
from kdbench.engine.device import make_accelerator
from kdbench.launch.estimate import estimate_seconds
from kdbench.launch.execution import Execution, run_folder
from kdbench.launch.plan import PlannedRun, at_a_time


def preview(plan: list[PlannedRun], source: Source, how: Execution) -> str:
    """What would run, for how long on this device, and where results would go."""
    accelerator = make_accelerator()
    device, suite = accelerator.device, plan[0].spec.suite
    modes = [
        resolve_compile_mode(
            how.compile, run.spec.suite, run.spec.architecture, device, how.processes
        )
        for run in plan
    ]
    done = [_steps_done(run, how) for run in plan]
    seconds = estimate_seconds(plan, done, how.results, device, modes, how.processes)
    rows = [_row(*row) for row in zip(plan, done, seconds, strict=True)]
    todo = sum(run.state == "to run" for run in plan)
    lines = [
        tabulate(rows, headers="keys", disable_numparse=True, colalign=ALIGN),
        "",
        f"Data: {source.describe()}",
        f"{todo} of {len(plan)} runs to do, about {_duration(sum(seconds))} of training "
        f"on {device.type}, evaluation not counted.",
        f"Training steps: {', '.join(sorted(set(modes)))} (--compile {how.compile}), "
        f"{suite.precision}.",
    ]
    if how.processes > 1:
        share = batch_share(suite, how.processes)
        lines.append(
            f"{how.processes} processes train each run together, on {share} images of a batch each."
        )
    jobs = at_a_time(plan, how.jobs)
    if jobs > 1:
        lines.append(f"{jobs} at a time; the time is that of one after the other.")
    return "\n".join(lines)


ALIGN = ("left", "left", "right", "right", "right", "right", "left", "left")


def _steps_done(run: PlannedRun, how: Execution) -> int:
    """Those it need not train again."""
    if how.overwrite or run.state != "to run":
        return 0
    return read_saved_steps(run_folder(how.runs, run.spec), run.spec.fingerprint())


def _row(run: PlannedRun, done: int, seconds: float) -> dict[str, str]:
    suite = run.spec.suite
    state: str = run.state
    if state in ("finished", "diverged"):
        state = f"exists ({state})"
    elif done:
        state = f"goes on after step {done:,}"
    return {
        "method": run.spec.method_name,
        "architecture": run.spec.architecture,
        "seed": str(run.spec.seed),
        "epochs": str(suite.schedule.epochs),
        "steps": f"{suite.total_steps:,}",
        "time": _duration(seconds) if run.state == "to run" else "",
        "state": state,
        "result": str(run.file),
    }


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
