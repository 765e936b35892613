"""Checks that the planted faults of reliability/mutations.py match the code."""

import re
from dataclasses import replace

import pytest
from faults import FAULTS, ROOT, function, planted
from planted_faults import GATE_ONLY

ALL = (*FAULTS, *GATE_ONLY)


@pytest.mark.parametrize("fault", ALL, ids=lambda fault: fault.name)
def test_the_text_that_a_fault_replaces_occurs_once(fault):
    for file, before, after in fault.patches:
        assert (ROOT / file).read_text(encoding="utf-8").count(before) == 1
        assert after != before


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_the_tests_that_catch_a_fault_exist(fault):
    assert fault.tests
    for test in map(function, fault.tests):
        file, _, name = test.partition("::")
        assert re.search(rf"^def {name}\(", (ROOT / "tests" / file).read_text(), re.MULTILINE)


def test_names_are_no_others():
    assert len({fault.name for fault in ALL}) == len(ALL)


def test_the_readme_shows_each_fault_and_what_caught_it():
    readme = (ROOT / "tests" / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+?) \| `.+? \| (.+) \|$", readme, re.MULTILINE)
    found = dict(row for row in rows if "::" in row[1])
    assert found == {f.name: "; ".join(f"`{test}`" for test in f.tests) for f in FAULTS}


def test_a_fault_that_cannot_be_planted_is_an_error():
    (fault,) = (fault for fault in FAULTS if fault.name == "evaluation in train mode")
    ((file, before, after),) = fault.patches
    with planted(fault, "kdbench") as copy:
        assert "method.eval()" not in (copy / file).read_text()
    gone = replace(fault, patches=((file, before + "?", after),))
    with pytest.raises(ValueError, match="evaluation in train mode"), planted(gone, "kdbench"):
        pass
