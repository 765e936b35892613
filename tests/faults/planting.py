"""A fault, and a copy of the repository that contains it."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Fault:
    name: str
    patches: tuple[tuple[str, str, str], ...]
    """File, text that occurs in it exactly once, and its replacement."""
    tests: tuple[str, ...] = ()
    """Node ids of the tests below tests/ that must fail, for at least some parameters."""
    methods: str = ""
    """Methods that the gate runs, in which it should detect the fault."""


# Node ids of tests below tests/
reference = "test_reference.py::test_three_steps_of_the_authors_code[{}]".format
contract = "test_contract.py::test_methods_keep_the_contract[{}-{}]".format
plain = "test_plain_methods.py::test_losses_match_their_formulas[{}]".format
invariant = "test_invariants.py::test_{}".format
batches = "test_batches.py::test_{}".format


def function(test: str) -> str:
    """Return a node id without parameters."""
    return test.partition("[")[0]


@contextmanager
def planted(fault: Fault | None, *folders: str) -> Iterator[Path]:
    """A copy of some folders and files of the repository, with the fault in it.

    Raises:
        ValueError: what the fault replaces does not stand there once.
    """
    with TemporaryDirectory(prefix="planted-") as place:
        copy = Path(place)
        for name in folders:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("*.pyc"))
            else:
                shutil.copy(ROOT / name, copy / name)
        for name, before, after in fault.patches if fault else ():
            text = (copy / name).read_text(encoding="utf-8")
            if text.count(before) != 1:
                raise ValueError(f"{fault.name}: {name} does not hold once what is replaced")
            (copy / name).write_text(text.replace(before, after), encoding="utf-8")
        yield copy
