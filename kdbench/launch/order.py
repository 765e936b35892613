"""A run as one process hands it to another."""

import json
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError

from kdbench.discovery import find_methods
from kdbench.engine.spec import RunSpec
from kdbench.errors import UserError
from kdbench.launch.execution import Execution, run_folder
from kdbench.launch.status import Ticket
from kdbench.results.schema import Record
from kdbench.suite.suite import Suite


class WorkOrder(Record):
    """One run, and all that its process must know."""

    suite: Suite
    architecture: str
    method: str
    """What finds it: its name, or the path of its file."""
    options: dict[str, Any]
    seed: int
    fingerprint: str
    """Of the run that was planned."""
    how: Execution
    folder: Path
    """Of the run: its checkpoint, log and status."""
    jobs: int = 1
    """Runs that share the device, for the result."""
    parent: int | None = None
    """Process whose end ends the run; without one it goes on by itself."""
    ticket: Ticket | None = None

    @classmethod
    def of(cls, spec: RunSpec, how: Execution, jobs: int = 1, parent: int | None = None) -> Self:
        """The order for a planned run."""
        return cls(
            suite=spec.suite,
            architecture=spec.architecture,
            method=spec.entry.argument,
            options=spec.options.model_dump(mode="json"),
            seed=spec.seed,
            fingerprint=spec.fingerprint(),
            how=how,
            folder=run_folder(how.runs, spec),
            jobs=jobs,
            parent=parent,
        )

    def spec(self) -> RunSpec:
        """The run that was planned.

        Raises:
            UserError: the method is not found any more, or is another by now.
        """
        (entry,) = find_methods([self.method])
        changed = UserError(
            f"Method '{entry.name}', or kdbench itself, changed after the run was planned; "
            "give the command again."
        )
        try:
            options = entry.method.Options.model_validate_json(json.dumps(self.options))
        except ValidationError:
            raise changed from None
        spec = RunSpec(self.suite, self.architecture, entry, options, self.seed)
        if spec.fingerprint() != self.fingerprint:
            raise changed
        return spec
