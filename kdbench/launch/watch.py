"""How all runs of a folder are, from their status files; Slurm's queue only adds what it knows."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from tabulate import tabulate

from kdbench.atomic import exists
from kdbench.errors import UserError, pluralize
from kdbench.launch import slurm
from kdbench.launch.status import FILE, RunStatus, Ticket, read_status
from kdbench.launch.submission import FOLDER, Submission, has_supervisor, read_submission

QUIET = timedelta(minutes=1)
"""Without a sign of life that is said: it may compile, or be gone."""
SILENCE = timedelta(minutes=5)
"""Without a sign of life a run is held for lost."""
UNDER_WAY = ("queued", "starting", "running")
REMEDY = "the same command sends it again, from its last checkpoint"


@dataclass(frozen=True)
class Watched:
    """A run and how it is."""

    folder: Path
    status: RunStatus
    state: str
    """The status's, or `lost`."""
    note: str
    """Why, where there is something to say."""

    @property
    def name(self) -> tuple[str, str, str, str]:
        """Suite, architecture, method and seed."""
        suite, architecture, method, seed = self.folder.parts[-4:]
        return suite, architecture, method, seed.removeprefix("seed")

    @property
    def under_way(self) -> bool:
        return self.state in UNDER_WAY


@dataclass
class Places:
    """Where submitted runs wait or run; asked once for all of them."""

    runs: Path
    _submissions: dict[str, Submission | None] = field(default_factory=dict)
    _supervised: dict[str, bool] = field(default_factory=dict)
    _queue: dict[str, str] | None = None
    _asked: bool = False

    def submission(self, ticket: Ticket) -> Submission | None:
        name = ticket.submission
        if name not in self._submissions:
            self._submissions[name] = read_submission(self.runs / FOLDER / name)
        return self._submissions[name]

    def job(self, ticket: Ticket) -> str | None:
        """Slurm's state of a run's job; empty where the job is gone, None where nobody says."""
        submission = self.submission(ticket)
        if submission is None:
            return None
        if submission.cluster == "local":
            if ticket.submission not in self._supervised:
                alive = has_supervisor(self.runs / FOLDER / ticket.submission)
                self._supervised[ticket.submission] = alive
            return None if self._supervised[ticket.submission] else ""
        if not self._asked:
            self._queue, self._asked = slurm.queue(), True
        if self._queue is None:
            return None
        return self._queue.get(submission.job_of(ticket.task), "")


def watch(runs: Path, folders: Sequence[Path] | None = None) -> list[Watched]:
    """All runs of a folder that ever had a status, or those named."""
    chosen = sorted(file.parent for file in runs.glob(f"*/*/*/seed*/{FILE}"))
    if folders is not None:
        chosen = [folder for folder in folders if exists(folder / FILE)]
    places = Places(runs)
    before = {folder: read_status(folder) for folder in chosen}
    jobs = {
        folder: places.job(status.ticket)
        for folder, status in before.items()
        if status is not None
        and status.ticket is not None
        and status.state in (*UNDER_WAY, "stopped")
    }
    found = []
    for folder in chosen:
        status = read_status(folder)  # again: what ended meanwhile left the queue after it said so
        if status is not None:
            found.append(
                Watched(folder, status, *_judge(status, jobs.get(folder), datetime.now(UTC)))
            )
    return found


def _judge(status: RunStatus, job: str | None, now: datetime) -> tuple[str, str]:
    """State and note."""
    reason = status.reason or ""
    waits = (job or "").startswith("PENDING")
    if status.state not in UNDER_WAY and not (status.state == "stopped" and waits):
        return status.state, reason
    if waits and job is not None:
        return "queued", job.removeprefix("PENDING").strip(" ()")
    if job == "":
        return "lost", f"its process is gone, and it left no word; {REMEDY}"
    silent = now - status.updated
    if status.state == "queued" or silent < QUIET:
        return status.state, reason
    said = f"no sign of life for {silent.total_seconds() // 60:.0f} min"
    return ("lost", f"{said}; {REMEDY}") if silent > SILENCE else (status.state, said)


def table(watched: Sequence[Watched]) -> str:
    """A line for each run, and how many are in each state."""
    rows = [_row(run) for run in watched]
    count = Counter(run.state for run in watched)
    summary = ", ".join(f"{number} {state}" for state, number in sorted(count.items()))
    align = ("left", "left", "left", "right", "left", "right", "right", "right", "left")
    lines = tabulate(rows, headers="keys", disable_numparse=True, colalign=align)
    return f"{lines}\n\n{pluralize(len(watched), 'run')}: {summary}.\n"


def _row(run: Watched) -> dict[str, str]:
    suite, architecture, method, seed = run.name
    status = run.status
    left = status.time_left if run.state == "running" else None
    return {
        "suite": suite,
        "architecture": architecture,
        "method": method,
        "seed": seed,
        "state": run.state,
        "epoch": f"{status.step * status.epochs / status.steps:.1f}/{status.epochs}",
        "student %": "" if status.top1 is None else f"{status.top1:.2f}",
        "left": "" if left is None else str(timedelta(seconds=round(left.total_seconds()))),
        "note": run.note,
    }


def chosen(
    watched: Sequence[Watched],
    suites: Sequence[str],
    methods: Sequence[str],
    architectures: Sequence[str],
) -> list[Watched]:
    """Those that are named; nothing named means all.

    Raises:
        UserError: a name that none of them has.
    """
    found = list(watched)
    asked = ((0, "suite", suites), (1, "architecture", architectures), (2, "method", methods))
    for place, kind, names in asked:
        known = {run.name[place] for run in watched}
        for name in names:
            if name not in known:
                raise UserError(f"No run has the {kind} '{name}'; there are: {_list(known)}.")
        found = [run for run in found if not names or run.name[place] in names]
    return found


def _list(names: set[str]) -> str:
    return ", ".join(sorted(names))


def tickets(watched: Sequence[Watched]) -> Iterator[tuple[Watched, Ticket]]:
    """Those that were submitted and are not over."""
    for run in watched:
        if run.under_way and run.status.ticket is not None:
            yield run, run.status.ticket
