"""Single faults to plant in a copy of kdbench, and what is expected to catch each.

Run by `python tests/reliability/mutations.py`, which shows that tests catch them, and by
`python tests/planted_faults.py`, which shows which of them the gate does.
"""

from faults import harness, methods
from faults.planting import ROOT, Fault, function, planted

__all__ = ["FAULTS", "ROOT", "Fault", "function", "planted"]

FAULTS = [
    Fault(name, *fault) for faults in (methods, harness) for name, fault in faults.FAULTS.items()
]
"""Faults in training, evaluation, storage and reports."""
