"""Tests of `kdbench run --match-cost`: controls with the cost of a method."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import is_one_sentence

from kdbench.discovery import find_methods
from kdbench.engine.flops import training_flops
from kdbench.engine.spec import RunSpec
from kdbench.launch.execution import Execution
from kdbench.launch.order import WorkOrder
from kdbench.launch.plan import make_plan
from kdbench.suite.suite import Suite

CPU = torch.device("cpu")


def epochs_of(out: str) -> dict[tuple[str, str], int]:
    """Return the epochs of a dry run by method and architecture."""
    rows = re.findall(r"^(\S+) +(\S+) +\d+ +(\d+) .*seed0\.json$", out, flags=re.MULTILINE)
    return {(method, architecture): int(epochs) for method, architecture, epochs in rows}


@pytest.mark.parametrize("architecture", ["resnet8", "wrn16-2"])
def test_each_method_has_the_flops_of_the_named_one(suite: Suite, architecture, tmp_path):
    names = ["baseline", "independent"]
    plan = make_plan(suite, names, [architecture], 2, [], tmp_path, match_cost="ffsd")
    (entry,) = find_methods(["ffsd"])
    wanted = training_flops(RunSpec(suite, architecture, entry, entry.options({}), 0), CPU)
    epochs = {}
    for run in plan:
        flops = training_flops(run.spec, CPU)
        count = run.spec.suite.schedule.epochs
        assert abs(flops - wanted) <= flops / count / 2
        assert epochs.setdefault(run.spec.entry.name, count) == count  # for all seeds
    assert epochs["baseline"] > 2 * epochs["independent"]


def test_the_named_method_keeps_the_suite(suite: Suite, tmp_path):
    (run,) = make_plan(suite, ["dml"], [], 1, [], tmp_path, match_cost="dml")
    assert run.spec.suite is suite


def test_options_that_change_the_cost_change_the_epochs(suite: Suite, tmp_path):
    settings = ["independent.networks=6"]
    (run,) = make_plan(suite, ["independent"], [], 1, settings, tmp_path, match_cost="independent")
    assert run.spec.suite.schedule.epochs == round(suite.schedule.epochs / 2)


def test_a_matched_run_is_that_of_as_many_epochs(run_tiny, kdbench):
    code, out, err = run_tiny("--methods", "baseline,dml", "--match-cost", "dml")
    assert (code, err) == (0, "")
    (file,) = Path("results").rglob("baseline/seed0.json")
    (tiny,) = Path("results/tiny").rglob("seed*.json")
    stretched, named = (json.loads(f.read_text()) for f in (file, tiny))
    epochs = stretched["protocol"]["schedule"]["epochs"]
    assert stretched["identity"]["suite"] == f"tiny@epochs={epochs}"
    assert len(stretched["history"]) == epochs > 2
    flops = stretched["cost"]["training_flops"]
    assert abs(flops - named["cost"]["training_flops"]) <= flops / epochs / 2
    assert f"tiny@epochs={epochs}, resnet8" in out and "tiny, resnet8" in out
    command = shlex.split(stretched["environment"]["command"])[1:]
    assert "exists (finished)" in kdbench(*command, "--dry-run")[1]


def test_a_dry_run_shows_the_epochs_of_each_architecture(run_tiny):
    architectures = ("--architectures", "resnet8,wrn16-2")
    code, out, _ = run_tiny(
        "--methods", "baseline", "--match-cost", "ffsd", *architectures, "--dry-run"
    )
    assert code == 0
    epochs = epochs_of(out)
    assert epochs["baseline", "resnet8"] > epochs["baseline", "wrn16-2"] > 2
    assert not Path("results").exists()


def test_runs_of_several_suites_keep_their_plan(suite: Suite, tmp_path):
    names = ["baseline", "independent"]
    plan = make_plan(suite, names, [], 1, [], tmp_path, match_cost="ffsd")
    how = Execution(tmp_path, tmp_path)
    orders = [WorkOrder.of(run.spec, how).model_dump_json() for run in plan]
    again = [WorkOrder.model_validate_json(order).spec() for order in orders]
    assert [spec.suite for spec in again] == [run.spec.suite for run in plan]
    assert len({spec.suite.name for spec in again}) == 2


def test_changes_of_a_suite_have_one_order(suite: Suite):
    one = suite.with_epochs(5).with_precision("bf16")
    other = suite.with_precision("bf16").with_epochs(5)
    assert one == other and one.name == "tiny@epochs=5,precision=bf16"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--match-cost", "fsd"], "Did you mean 'ffsd'?"),
        (["--match-cost", "all"], "takes one method"),
        (["--match-cost", "ffsd", "--epochs", "3"], "leave out --epochs"),
        (
            ["--match-cost", "ffsd", "--architectures", "resnet20+resnet8"],
            "networks of one architecture",
        ),
    ],
)
def test_costs_that_cannot_be_matched_print_one_sentence(run_tiny, arguments, words):
    code, out, err = run_tiny("--methods", "baseline", *arguments)
    assert (code, out) == (2, "")
    assert is_one_sentence(err) and words in err


def test_a_method_that_fails_is_named(run_tiny):
    Path("breaks.py").write_text(
        "from kdbench.methods.baseline import Baseline\n\n\nclass Breaks(Baseline):\n"
        "    def forward(self, views, labels):\n        raise RuntimeError('no such luck')\n"
    )
    code, _, err = run_tiny("--methods", "baseline", "--match-cost", "./breaks.py")
    assert code == 2
    assert is_one_sentence(err) and "breaks.py, line 6: RuntimeError: no such luck" in err
