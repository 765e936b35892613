"""Controls at equal cost: a cheaper method is trained for longer."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from kdbench.discovery import find_methods
from kdbench.engine.flops import training_flops
from kdbench.engine.spec import RunSpec
from kdbench.errors import UserError


def matched(specs: Sequence[RunSpec], name: str) -> list[RunSpec]:
    """The runs over as many epochs as cost, to the nearest epoch, what a method costs.

    Training FLOPs of a run then equal those of the named method, with its default options, under
    the suite's own schedule. They are counted on the CPU, once for all seeds.

    Args:
        specs: runs under the suite's own schedule.
        name: a method's name, or the path of its file.

    Raises:
        UserError: an unknown method, or one that does not fit the suite or fails.
    """
    if name == "all":
        raise UserError("--match-cost takes one method, not 'all'.")
    (entry,) = find_methods([name])
    epochs: dict[tuple[str, str], int] = {}
    found = []
    for spec in specs:
        key = spec.method_name, spec.architecture
        if key not in epochs:
            named = replace(spec, entry=entry, options=entry.options({}))
            named.check()
            ratio = _flops(named) / _flops(spec)
            epochs[key] = max(1, round(spec.suite.schedule.epochs * ratio))
        found.append(replace(spec, suite=spec.suite.with_epochs(epochs[key])))
    return found


def _flops(spec: RunSpec) -> int:
    try:
        return training_flops(spec, torch.device("cpu"))
    except Exception as error:  # a method may raise anything, and would in the run
        what = spec.entry.locate_error(error).split("\n")[0]
        raise UserError(f"Method '{spec.entry.name}' fails: {what}.") from error
