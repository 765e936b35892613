"""The plan as a table, for `--dry-run`."""

from datetime import timedelta
from pathlib import Path

from tabulate import tabulate

from kdbench.data import Source, batch_share
from kdbench.engine.device import make_accelerator
from kdbench.engine.mode import Compile, step_mode
from kdbench.launch.estimate import estimate_seconds
from kdbench.launch.plan import PlannedRun, at_a_time


def preview(
    plan: list[PlannedRun],
    source: Source,
    results: Path,
    compile: Compile = "auto",
    jobs: int = 1,
    processes: int = 1,
) -> str:
    """What would run, for how long on this device, and where results would go."""
    accelerator = make_accelerator()
    device, suite = accelerator.device, plan[0].spec.suite
    modes = [
        step_mode(compile, run.spec.suite, run.spec.architecture, device, processes) for run in plan
    ]
    seconds = estimate_seconds(plan, results, device, modes, processes)
    rows = [_row(run, time) for run, time in zip(plan, seconds, strict=True)]
    todo = sum(run.state == "to run" for run in plan)
    lines = [
        tabulate(rows, headers="keys", disable_numparse=True, colalign=ALIGN),
        "",
        f"Data: {source.describe()}",
        f"{todo} of {len(plan)} runs to do, about {_duration(sum(seconds))} of training "
        f"on {device.type}, evaluation not counted.",
        f"Training steps: {', '.join(sorted(set(modes)))} (--compile {compile}), "
        f"{suite.precision}.",
    ]
    if processes > 1:
        share = batch_share(suite, processes)
        lines.append(
            f"{processes} processes train each run together, on {share} images of a batch each."
        )
    if at_a_time(plan, jobs) > 1:
        lines.append(f"{at_a_time(plan, jobs)} at a time; the time is that of one after the other.")
    return "\n".join(lines)


ALIGN = ("left", "left", "right", "right", "right", "right", "left", "left")


def _row(run: PlannedRun, seconds: float) -> dict[str, str]:
    suite = run.spec.suite
    return {
        "method": run.spec.method_name,
        "architecture": run.spec.architecture,
        "seed": str(run.spec.seed),
        "epochs": str(suite.schedule.epochs),
        "steps": f"{suite.total_steps:,}",
        "time": _duration(seconds) if run.state == "to run" else "",
        "state": "to run" if run.state == "to run" else f"exists ({run.state})",
        "result": str(run.file),
    }


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
