"""Tests of `kdbench run --match-cost`: controls with the cost of a method."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from conftest import is_one_sentence
from launched import result_of, write_method

from kdbench.engine.flops import training_flops
from kdbench.launch.execution import Execution
from kdbench.launch.order import WorkOrder
from kdbench.launch.plan import make_plan, make_specs
from kdbench.suite.suite import Suite

CPU = torch.device("cpu")


@pytest.mark.parametrize("architecture", ["resnet8", "wrn16-2"])
def test_each_method_has_the_flops_of_the_named_one(suite: Suite, architecture, tmp_path):
    names = ["baseline", "independent", "ffsd"]
    plan = make_plan(suite, names, [architecture], 2, [], tmp_path, match_cost="ffsd")
    (named,) = make_specs(suite, ["ffsd"], [architecture])
    wanted = training_flops(named, CPU)
    epochs = {}
    for run in plan:
        name, matched = run.spec.entry.name, run.spec.suite
        flops, count = training_flops(run.spec, CPU), matched.schedule.epochs
        assert abs(flops - wanted) <= flops / count / 2
        assert epochs.setdefault(name, count) == count  # for all seeds
        assert matched is suite or name != "ffsd"
    assert epochs["baseline"] > 2 * epochs["independent"]


def test_options_that_change_the_cost_change_the_epochs(suite: Suite, tmp_path):
    settings = ["independent.networks=6"]
    (run,) = make_plan(suite, ["independent"], [], 1, settings, tmp_path, match_cost="independent")
    assert run.spec.suite.schedule.epochs == round(suite.schedule.epochs / 2)


def test_a_matched_run_is_that_of_as_many_epochs(run_tiny, kdbench):
    code, out, err = run_tiny("--methods", "baseline,dml", "--match-cost", "dml")
    assert (code, err) == (0, "")
    (file,) = Path("results").rglob("baseline/seed0.json")
    stretched, named = json.loads(file.read_text()), result_of("dml")
    epochs = stretched["protocol"]["schedule"]["epochs"]
    assert stretched["identity"]["suite"] == f"tiny@epochs={epochs}"
    assert len(stretched["history"]) == epochs > 2
    flops = stretched["cost"]["training_flops"]
    assert abs(flops - named["cost"]["training_flops"]) <= flops / epochs / 2
    assert f"tiny@epochs={epochs}, resnet8" in out and "tiny, resnet8" in out
    command = shlex.split(stretched["environment"]["command"])[1:]
    assert "exists (finished)" in kdbench(*command, "--dry-run")[1]


def test_a_dry_run_shows_the_epochs_of_each_architecture(run_tiny):
    more = ("--architectures", "resnet8,wrn16-2", "--dry-run")
    code, out, _ = run_tiny("--methods", "baseline", "--match-cost", "ffsd", *more)
    rows = re.findall(r"^baseline +(\S+) +\d+ +(\d+) .*seed0\.json$", out, flags=re.MULTILINE)
    epochs = {architecture: int(count) for architecture, count in rows}
    assert code == 0 and epochs["resnet8"] > epochs["wrn16-2"] > 2
    assert not Path("results").exists()


def test_runs_of_several_suites_keep_their_plan(suite: Suite, tmp_path):
    plan = make_plan(suite, ["baseline", "independent"], [], 1, [], tmp_path, match_cost="ffsd")
    how = Execution(tmp_path, tmp_path)
    orders = [WorkOrder.of(run.spec, how).model_dump_json() for run in plan]
    suites = [WorkOrder.model_validate_json(order).spec().suite for order in orders]
    assert suites == [run.spec.suite for run in plan] and suites[0].name != suites[1].name


def test_changes_of_a_suite_have_one_order(suite: Suite):
    one = suite.with_epochs(5).with_precision("bf16")
    other = suite.with_precision("bf16").with_epochs(5)
    assert one == other and one.name == "tiny@epochs=5,precision=bf16"


REFUSED = {
    ("--match-cost", "fsd"): "Did you mean 'ffsd'?",
    ("--match-cost", "all"): "takes one method",
    ("--match-cost", "ffsd", "--epochs", "3"): "leave out --epochs",
    ("--match-cost", "ffsd", "--architectures", "resnet20+resnet8"): "networks of one architecture",
    ("--match-cost", "./breaks.py"): "breaks.py, line 15: RuntimeError: no such luck",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_costs_that_cannot_be_matched_print_one_sentence(run_tiny, arguments):
    write_method("breaks", "raise RuntimeError('no such luck')")
    code, out, err = run_tiny("--methods", "baseline", *arguments)
    assert (code, out) == (2, "")
    assert is_one_sentence(err) and REFUSED[arguments] in err
