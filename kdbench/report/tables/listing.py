"""Tables of suites, methods and architectures, for `kdbench list`."""

from collections.abc import Sequence

import torch
from tabulate import tabulate

from kdbench.backbones import ARCHITECTURES, build
from kdbench.discovery import MethodEntry, find_methods
from kdbench.engine.measure import count_parameters
from kdbench.suite.load import all_suites
from kdbench.suite.suite import Suite


def listing() -> str:
    """Return three tables: suites, methods and architectures."""
    suites = list(all_suites())
    tables = [
        tabulate(rows, headers="keys")
        for rows in (
            [_suite(suite) for suite in suites],
            [_method(entry) for entry in find_methods(["all"])],
            [_architecture(name, suites) for name in ARCHITECTURES],
        )
    ]
    return "\n\n".join(tables)


def _suite(suite: Suite) -> dict[str, object]:
    return {
        "suite": suite.name,
        "epochs": suite.schedule.epochs,
        "classes": suite.data.classes,
        "images": suite.data.count(suite.data.train),
        "networks": suite.networks,
        "architecture": suite.default_architecture,
        "description": suite.description,
    }


def _architecture(name: str, suites: Sequence[Suite]) -> dict[str, object]:
    """Return a row with the parameters for the largest number of classes among its suites."""
    offered = [suite.data.classes for suite in suites if name in suite.architectures]
    classes = max(offered, default=100)
    with torch.device("meta"):  # no weights are allocated
        parameters = count_parameters(build(name, classes))
    return {"architecture": name, "classes": classes, "parameters": f"{parameters:,}"}


def _method(entry: MethodEntry) -> dict[str, object]:
    method = entry.method
    return {
        "method": entry.name,
        "year": method.year or "",
        "networks": method.fixed_networks or f"suite's, {method.minimum_networks} or more",
        "views": method.views or "one per network",
        "paper": method.paper,
    }
