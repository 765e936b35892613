"""The short form of `python tests/reliability/soak.py`, and that it finds what it looks for."""

from dataclasses import replace

import pytest
from reliability.soak import FORMS, Sample, Soaked, differing, soak

pytestmark = pytest.mark.slow


def test_many_runs_leak_nothing_and_agree_in_both_forms(tmp_path):
    methods = ["baseline", "dml", "ffsd"]
    one, two = (soak(form, methods, 4, tmp_path / form) for form in FORMS)
    for soaked in (one, two):
        assert len(soaked.samples) == len(soaked.numbers) == 12
        assert soaked.faults(leak=5.0) == []  # so few runs do not tell a leak from a warm-up
    assert differing(one, two) == []


NUMBERS = {str(run): {"top1": 1.0} for run in range(6)}
SAMPLES = [Sample(100.0 + (run == 3), 10, 3) for run in range(6)]
GOOD = Soaked("one process", 6, 2, NUMBERS, SAMPLES, left=0, seconds=1.0)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"numbers": {}}, "6 results are not there"),
        ({"left": 1}, "1 processes are left"),
        ({"samples": [Sample(100, 10 + n, 3) for n in range(6)]}, "open files went from 12 to 14"),
        ({"samples": [Sample(100 + n, 9, 3) for n in range(6)]}, "memory grew by 1.00 MiB a run"),
    ],
)
def test_growth_and_missing_results_are_faults(change, fault):
    assert GOOD.faults() == [] and differing(GOOD, GOOD) == []
    found = replace(GOOD, **change)
    assert len(found.faults()) == 1 and found.faults()[0].startswith(fault)
    assert bool(differing(GOOD, found)) is ("numbers" in change)
