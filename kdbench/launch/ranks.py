"""The processes that train one run together: what they agree on, and how they end together.

What they say to one another goes through the store that brought them together, not through
collectives: it works while some are stuck in one, on CPUs and on GPUs alike.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta

import torch
from torch import distributed

from kdbench.engine.device import COLLECTIVE_TIMEOUT, make_accelerator, trains_on_cpu
from kdbench.errors import (
    RESUME_HINT,
    PlanAbandonedError,
    PlanInterruptedError,
    UnwritableError,
    UserError,
)
from kdbench.launch.place import Place
from kdbench.launch.pulse import GIVE_SECONDS, LOOKS, Pulse
from kdbench.launch.shares import check_gpus, cores, threads_are_the_users
from kdbench.launch.status import NoReporter, StatusReporter
from kdbench.signals import exit_code

SETTLE = timedelta(seconds=10)
"""Between the first process that fails in a run and the last, where all meet the same error."""

PATIENCE_SECONDS = 2.0
"""For which the main process may still meet an error itself before it speaks for another."""

LINGER_SECONDS = 15.0
"""For which the others wait for the main process to speak, at most: their end makes a launcher end
it too."""

PARTING_SECONDS = 10.0
"""For which a process waits at its end for its watcher, and the main one for the others."""

WATCH_SECONDS = 0.5
POLL_SECONDS = 0.05

PREPARING = timedelta(days=1)
"""For what one process does while others wait, such as a download; one that fails says so."""

END = "end"
SPOKEN = "spoken"


@dataclass(frozen=True)
class Ending:
    """Why all processes end."""

    sentence: str
    code: int
    """To exit with."""
    reason: str | None = None
    """Why the run under way failed; None where it did not."""


GONE = Ending(
    f"The launcher on the machine of process 0 is gone, or that machine; {RESUME_HINT}.", 1
)
"""Of processes whose store, which is that launcher's, does not answer."""


class Ranks:
    """The processes of a plan, this one among them. One process alone waits for nobody."""

    def __init__(
        self,
        place: Place,
        store: distributed.Store | None = None,
        speak: Callable[[str], None] = print,
    ):
        self.place = place
        self.count = place.processes
        self.is_main = place.rank == 0
        """Whether this process speaks and writes for all."""
        self.in_step = True
        """Whether the processes can still train together."""
        self.lost = False
        """Whether the first that failed in a run did so for want of another."""
        self.on_left: Callable[[Ending], object] | None = None
        """Says in the status of the run under way why it was left, for the same."""
        self.on_failure: Callable[[str], object] | None = None
        """Records the run under way as failed, for a main thread that is stuck in it."""
        self.on_end: Callable[[], None] = lambda: None
        """Leaves the terminal as it was, for the same."""
        self._store = store
        self._speak = speak
        self._stderr = sys.stderr  # where processes other than the main one are silent later
        self._voice = threading.Lock()
        """Whoever has it, the main thread or the watcher, ends this process."""
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._over = threading.Event()
        """Nothing is left to watch."""

    def exchange(self, subject: str, value: str, patience: timedelta = PREPARING) -> list[str]:
        """What each process says on a subject, in their order; waits for all.

        Raises:
            TimeoutError: one of them said nothing for so long.
        """
        if self._store is None:
            return [value]
        keys = [f"{subject}/{rank}" for rank in range(self.count)]
        with _ended_by_the_watcher():
            self._store.set(keys[self.place.rank], value)
            deadline = time.monotonic() + patience.total_seconds()
            while not self._store.check(keys):  # its own wait would hold others off, and warn
                if time.monotonic() > deadline:
                    raise TimeoutError(f"a process said nothing on '{subject}'")
                time.sleep(POLL_SECONDS)
            return [self._store.get(key).decode() for key in keys]

    def require_alike(self, seen: dict[str, str], remedy: str) -> None:
        """Refuse processes that see different things.

        Args:
            seen: by name what this process sees, or its digest.
            remedy: what the user can do, as a clause.

        Raises:
            UserError: names the first that differs.
        """
        for name, own in seen.items():
            values = self.exchange(f"seen/{name}", own)
            for rank, value in enumerate(values):
                if value != values[0]:
                    raise UserError(
                        f"Processes 0 and {rank} do not have the same {name}; {remedy}."
                    )

    @contextlib.contextmanager
    def one_before_others(self, what: str) -> Iterator[None]:
        """On each machine one process does it first, and the others find what it left in caches."""
        if self.place.local_rank:
            self.exchange(what, "")
        yield
        if not self.place.local_rank:
            self.exchange(what, "")

    def settle(self, run: str, reason: str, moment: str, lost: bool) -> str:
        """Why a run failed that failed here: the reason of the process that failed first.

        Where the others did not fail at the same moment, `in_step` is False from then on.

        Args:
            run: names the run.
            reason: of this process.
            moment: where it failed; equal in processes that are in step.
            lost: whether it failed for want of another process.
        """
        if self._store is None:
            return reason
        mine = json.dumps([self.place.rank, reason, lost])
        with _ended_by_the_watcher():
            said = self._store.compare_set(f"{run}/first", "", mine)
        rank, first, self.lost = json.loads(said)
        try:
            self.in_step = len(set(self.exchange(run, moment, SETTLE))) == 1
        except TimeoutError:
            self.in_step = False
        return str(first) if self.in_step else f"{first}, says process {rank} of {self.count}"

    def end(self, error: BaseException) -> None:
        """Make all processes end for what ends this one; the main one speaks."""
        if self._store is None:
            return
        if not self._voice.acquire(blocking=False):
            threading.Event().wait()  # the watcher speaks, and ends the process
        ending = _ending(error)
        if not self.is_main and isinstance(error, UserError):
            ending = replace(ending, sentence=f"process {self.place.rank}: {ending.sentence}")
        with contextlib.suppress(distributed.DistError):  # its loss ends the others too
            self._store.compare_set(END, "", json.dumps(asdict(ending)))
            if self.is_main:
                self._store.set(SPOKEN, "")
            else:
                self._linger()
        if self.is_main and self.count > self.place.local_processes:  # the store goes with it
            time.sleep(2 * WATCH_SECONDS)

    def watch(self) -> None:
        """End this process when another one must end, also while it is stuck in a collective."""
        self._watcher.start()

    def unwatch(self) -> None:
        """Python must not end beside a thread that is in a call of the store: it would abort."""
        self._over.set()
        self._watcher.join(PARTING_SECONDS)

    def part(self) -> None:
        """Use the store no more; the main process, which it may end with, is the last that does."""
        assert self._store is not None
        self.unwatch()
        others = [f"parted/{rank}" for rank in range(1, self.count)]
        deadline = time.monotonic() + PARTING_SECONDS
        with contextlib.suppress(distributed.DistError):  # who is lost now has done its work
            if not self.is_main:
                self._store.set(f"parted/{self.place.rank}", "")
            while self.is_main and not self._store.check(others) and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)

    def _watch(self) -> None:
        assert self._store is not None
        pulse = Pulse(self._store, self.place.rank, self.count)
        while not self._over.wait(WATCH_SECONDS):
            try:
                silent = pulse.beat()
                if silent is not None:
                    self._store.compare_set(END, "", json.dumps(asdict(_lost(silent))))
                ended = self._store.check([END])
                ending = Ending(**json.loads(self._store.get(END))) if ended else None
            except distributed.DistError:
                ending = GONE
            if ending is not None:
                return self._end_for(ending)

    def _linger(self) -> None:
        """Until the main process has spoken, which ends a moment later."""
        assert self._store is not None
        deadline = time.monotonic() + LINGER_SECONDS
        while time.monotonic() < deadline and not self._store.check([SPOKEN]):
            if self._over.wait(POLL_SECONDS):
                return
        self._over.wait(PATIENCE_SECONDS)

    def _end_for(self, ending: Ending) -> None:
        if self.is_main or ending is GONE:
            self._over.wait(PATIENCE_SECONDS)
        else:
            with contextlib.suppress(distributed.DistError):
                self._linger()
        if self._over.is_set() or not self._voice.acquire(blocking=False):
            return  # the main thread ends the process
        if self.is_main:
            self.on_end()
            with contextlib.suppress(UnwritableError):  # the sentence has the reason too
                if ending.reason is not None and self.on_failure is not None:
                    self.on_failure(ending.reason)
            if self.on_left is not None:
                self.on_left(ending)
        if self.is_main or (ending is GONE and self.place.local_rank == 0):
            with contextlib.redirect_stderr(self._stderr):
                self._speak(ending.sentence)
        if self.is_main and self._store is not None:
            with contextlib.suppress(distributed.DistError):
                self._store.set(SPOKEN, "")
        os._exit(ending.code)


@contextlib.contextmanager
def _ended_by_the_watcher() -> Iterator[None]:
    """Where the store is gone, wait for the watcher, which meets the same and ends the process."""
    try:
        yield
    except distributed.DistError:
        threading.Event().wait()


@contextlib.contextmanager
def together(asked: int | None, speak: Callable[[str], None]) -> Iterator[Ranks]:
    """The processes that a launcher started; whatever ends one of them ends all, with one voice.

    Without a launcher it is this process alone.

    Args:
        asked: number of processes that there must be; None takes those that there are.
        speak: tells the user why all ended, in one sentence.

    Raises:
        UserError: there are more or fewer, or too few GPUs for them, or they do not meet.
    """
    place = Place.of_this_process()
    if place.launched and asked not in (None, place.processes):
        raise UserError(
            f"--num-processes asks for {asked} processes, and the launcher started "
            f"{place.processes}; give both the same number."
        )
    if place.processes == 1:
        # `accelerate launch` sets both; a user who wants the CPU, the first.
        launched = {"ACCELERATE_USE_CPU", "ACCELERATE_MIXED_PRECISION"} <= os.environ.keys()
        if asked is None and launched:
            speak("accelerate launch --cpu starts one process; 'kdbench run --num-processes' more.")
        yield Ranks(place)
        return
    ranks = Ranks(place, _meet(place), speak)
    ranks.watch()
    try:
        yield ranks
        ranks.exchange("done", "")
        ranks.part()
        distributed.destroy_process_group()
    except BaseException as error:
        ranks.end(error)
        ranks.unwatch()
        raise


def _meet(place: Place) -> distributed.Store:
    """The store that all processes of the launcher have in common."""
    check_gpus(place.local_processes)
    if trains_on_cpu() and not threads_are_the_users():
        torch.set_num_threads(max(1, cores() // place.local_processes))
    where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        met = make_accelerator().num_processes
        store = distributed.TCPStore(
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timeout=COLLECTIVE_TIMEOUT
        )
    except (distributed.DistError, KeyError, ValueError) as error:
        raise UserError(
            f"The {place.processes} processes did not meet at {where} (MASTER_ADDR, MASTER_PORT): "
            f"{str(error).splitlines()[0]}."
        ) from error
    if met != place.processes:
        raise UserError(
            f"The launcher started {place.processes} processes, and Accelerate sees {met}; start "
            "kdbench with torchrun, or with 'kdbench run --num-processes'."
        )
    # A launcher that starts its processes again keeps its store, and what was said there.
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return distributed.PrefixStore(f"kdbench/{attempt}", store)


def tell(reporter: StatusReporter | NoReporter, ending: Ending) -> None:
    """Put into a run's status why its processes end while it is under way."""
    stopped = ending.code > 128 or ending is GONE
    reporter.left("stopped" if stopped else "failed", ending.reason or ending.sentence)


def _lost(rank: int) -> Ending:
    seconds = LOOKS * GIVE_SECONDS
    reason = f"process {rank}, or its machine, gave no sign of life for {seconds:.0f} seconds"
    return Ending(f"{reason[0].upper()}{reason[1:]}; {RESUME_HINT}.", 1, reason)


def _ending(error: BaseException) -> Ending:
    if isinstance(error, PlanAbandonedError):
        return Ending(str(error), error.exit_code, error.reason)
    if isinstance(error, UserError | PlanInterruptedError):
        return Ending(str(error), error.exit_code)
    if isinstance(error, KeyboardInterrupt):
        return Ending("stopped by a signal", exit_code(error))
    return Ending(f"{type(error).__name__}: {error}", 1)
