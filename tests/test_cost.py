"""Tests of accuracy against training FLOPs, and of controls at equal cost."""

import math
import re
from itertools import chain

import pytest
from made_results import LOST, committed, made_seeds

from kdbench.report.analysis.boards import boards
from kdbench.report.analysis.cost import cost_frame, equal_cost, equal_cost_tables
from kdbench.report.command import make_report
from kdbench.report.figures.captioned import cost_points
from kdbench.results.files import write_result
from kdbench.suite.load import load_suite, suite_files

REDUCED = load_suite("cifar100-reduced")


def make(method, *top1, epochs=10, flops=1e15, suite=REDUCED, cost=None, **changes):
    """Return results of a method with given accuracies by seed."""
    work = {"training_flops": flops and round(flops)} | (cost or {})
    return made_seeds(method, [*top1], suite=suite.with_epochs(epochs), cost=work, **changes)


def test_rows_are_methods_and_epochs_of_one_recipe():
    results = make("baseline", 60.0, 62.0) + make("baseline", 64.0, epochs=30, flops=3e15)
    results += make("ffsd", 63.0, flops=3e15)
    frame = cost_frame(results)
    assert frame.method.tolist() == ["baseline", "baseline", "ffsd"]
    assert frame.epochs.tolist() == [10, 30, 10]
    assert frame.suite.unique().tolist() == ["cifar100-reduced"] and frame.key.nunique() == 1
    assert (frame.n[0], frame.student_top1[0]) == (2, 61.0)
    assert frame.student_top1_sd[0] == pytest.approx(math.sqrt(2))
    assert frame.training_flops.tolist() == [1e15, 3e15, 3e15]


def test_other_recipes_and_precisions_are_other_groups():
    results = make("a", 60.0) + make("a", 60.0, environment={"precision": "tf32"})
    for suite in (REDUCED.with_precision("bf16"), REDUCED.model_copy(update={"batch_size": 64})):
        results += make("a", 60.0, suite=suite)
    frame = cost_frame(results)
    assert len(frame) == frame.key.nunique() == 4
    assert set(frame.suite) == {"cifar100-reduced", "cifar100-reduced@precision=bf16"}


def test_a_new_setting_leaves_keys_of_old_results_unchanged():
    """Older results lack settings that were added later."""
    template = committed("dml")
    del template.protocol["data"]["encoded"]
    assert cost_frame([template]).key[0] == cost_frame(make("dml", 60.0)).key[0]


@pytest.mark.parametrize("name", suite_files())
def test_a_recipe_over_any_number_of_epochs_is_one_group(name):
    """Milestones at thirds of 90 and of 92 epochs differ in the last bit."""
    suite = load_suite(name)
    own = suite.schedule.epochs
    runs = (make("baseline", 60.0, suite=suite, epochs=n) for n in range(own, 3 * own))
    results = list(chain.from_iterable(runs))
    assert cost_frame(results).key.nunique() == 1
    later = suite.schedule.model_copy(update={"warmup_epochs": 0.5})
    results += make("baseline", 60.0, suite=suite.model_copy(update={"schedule": later}))
    assert cost_frame(results).key.nunique() == 2


@pytest.mark.parametrize(
    ("environment", "cost", "seconds"),
    [({}, {}, 20.0), ({"device": "another"}, {}, None), ({}, {"jobs": 2}, 10.0)],
)
def test_times_use_undisturbed_runs_executed_alike(environment, cost, seconds):
    results = make("a", 60.0, cost={"training_seconds": 10.0})
    cost = {"training_seconds": 30.0} | cost
    results += make("a", 60.0, first=1, environment=environment, cost=cost)
    (found,) = cost_frame(results).training_seconds
    assert found == seconds if seconds else math.isnan(found)


def test_unfinished_runs_have_no_row():
    lost = committed("dml").model_copy(update=LOST)
    assert cost_frame([lost]).empty and cost_frame([]).empty
    assert equal_cost([]).empty and equal_cost_tables(equal_cost([])) == {}


def test_a_control_is_the_nearest_in_flops_and_paired_by_seed():
    results = make("baseline", 60.0, 61.0) + make("ffsd", 66.0, 68.0, 90.0, flops=4.0e15)
    results += make("baseline", 65.0, 66.0, epochs=40, flops=4.1e15)
    results += make("baseline", 50.0, 50.0, epochs=39, flops=3.85e15)
    results += make("far", 63.0, flops=2e15) + make("unknown", 63.0, flops=None)
    found = equal_cost(results).set_index("method")
    assert set(found.index) == {"ffsd", "far", "unknown"}
    assert (found.control_epochs["ffsd"], found.control_top1["ffsd"]) == (40, 65.5)
    assert (found.difference["ffsd"].difference, found.difference["ffsd"].n) == (1.5, 2)
    for method in ("far", "unknown"):
        assert math.isnan(found.control_top1[method]) and found.difference[method] is None


@pytest.mark.parametrize(("flops", "near"), [(1.049e15, True), (1.051e15, False)])
def test_equal_cost_is_within_five_per_cent(flops, near):
    results = make("ffsd", 60.0) + make("baseline", 60.0, epochs=30, flops=flops)
    assert equal_cost(results).control_top1.notna().tolist() == [near]


def test_a_control_may_be_another_method_and_never_of_another_precision():
    results = make("ffsd", 60.0) + make("independent", 61.0, epochs=12)
    assert equal_cost(results, "independent").control_top1.tolist() == [61.0]
    results = make("ffsd", 60.0) + make("baseline", 61.0, environment={"precision": "tf32"})
    assert equal_cost(results).control_top1.isna().all()


def test_the_table_shows_groups_that_have_a_control():
    results = make("ffsd", 66.0, 68.0, flops=4e15) + make("far", 63.0)
    assert equal_cost_tables(equal_cost(results)) == {}
    results += make("baseline", 65.0, 66.0, epochs=40, flops=4e15)
    results += make("ffsd", 60.0, architecture="resnet8")
    (table,) = equal_cost_tables(equal_cost(results)).values()
    text = table.text(markdown=True)
    assert text.startswith("### cifar100-reduced, resnet20: baseline trained for equal FLOPs\n")
    assert "resnet8" not in text
    rows = [" ".join(s.split()) for s in text.splitlines() if re.match(r"\| *(ffsd|far) ", s)]
    assert rows == [
        "| ffsd | 10 | 67.00 | 4.000 | 65.50 | 40 | +1.50 | -4.85 to +7.85 | 0.205 | 2 |"
    ]
    assert table.notes == [
        "No baseline was trained for equal FLOPs (within 5%) as 10 epochs of far."
    ]


def test_a_control_of_several_versions_has_the_seeds_of_all():
    """A stretched control is often trained later than the other runs."""
    longer = {"epochs": 40, "flops": 4e15}
    results = make("baseline", 65.0, 66.0, **longer) + make("ffsd", 66.0, 68.0, 70.0, flops=4e15)
    results += make("baseline", 67.0, first=2, method_hash="another0hash", **longer)
    results += make("baseline", 60.0, method_hash="a0third0hash")
    found = equal_cost(results)
    assert found.method.tolist() == ["ffsd"]
    assert (found.difference[0].difference, found.difference[0].n) == (2.0, 3)
    (table,) = equal_cost_tables(found).values()
    assert table.notes == ["The seeds of baseline come from several versions of it."]
    assert table.rows[0]["its epochs"] == "40"


def test_two_stretched_controls_of_one_suite_serve_the_methods_that_they_match():
    results = make("ffsd", 66.0, flops=4e15) + make("one", 61.0, flops=2e15)
    results += make("baseline", 65.0, epochs=40, flops=4e15)
    results += make("baseline", 63.0, epochs=20, flops=2e15, method_hash="another0hash")
    assert equal_cost(results).control_epochs.tolist() == [40, 20]
    (table,) = equal_cost_tables(equal_cost(results)).values()
    assert len(table.rows) == 2 and table.notes == []


def with_a_control(**changes):
    """Return results of a method, of one network, and of one that had the method's FLOPs."""
    return [
        *make("ffsd", 66.0, **changes),
        *make("baseline", 60.0, flops=3e14, **changes),
        *make("baseline", 63.0, epochs=33, **changes),
    ]


@pytest.mark.parametrize(
    ("form", "title"),
    [
        ("terminal", "baseline trained for equal FLOPs\nmethod  "),
        ("markdown", "baseline trained for equal FLOPs\n\n|"),
        ("latex", r"resnet20: baseline trained for equal FLOPs.}"),
    ],
)
def test_every_table_for_readers_has_the_controls_below(tmp_path, form, title):
    for result in with_a_control():
        write_result(tmp_path, result)
    assert make_report(tmp_path, None, form, "baseline").text.count(title) == 1


def test_the_equal_cost_table_follows_both_of_its_suites(tmp_path):
    for result in with_a_control():
        write_result(tmp_path, result)
    short, long = "cifar100-reduced", "cifar100-reduced@epochs=33"
    for suites in (None, [short], [long], [short, long]):
        text = make_report(tmp_path, suites, "terminal", "baseline").text
        assert text.count("baseline trained for equal FLOPs") == 1, suites
        assert (f"{short}, resnet20\n" in text) is (suites != [long])
        assert (f"{long}, resnet20\n" in text) is (suites != [short])


def test_tables_of_two_recipes_have_two_titles():
    results = with_a_control() + with_a_control(environment={"precision": "tf32"})
    tables = equal_cost_tables(equal_cost(results))
    assert len({table.title for table in tables.values()}) == len(tables) == 2


def test_a_suite_of_another_name_is_not_among_the_points():
    """The recipe may be the same."""
    results = make("baseline", 60.0) + make("ffsd", 66.0)
    mine = REDUCED.model_copy(update={"name": "mine"})
    others = make("one", 61.0, suite=mine) + make("baseline", 61.0, suite=mine, epochs=30)
    costs = cost_frame(results + others)
    assert costs.key.nunique() == 1
    (board,) = boards(results, "baseline")
    assert set(cost_points(board, costs, "baseline")[0].name) == {"baseline", "ffsd"}


def test_two_reference_versions_of_equal_cost_define_the_unit():
    results = make("baseline", 60.0) + make("ffsd", 66.0, flops=3e15)
    results += make("baseline", 61.0, first=1, method_hash="another0hash")
    (board,) = boards(results, "baseline")
    points, label = cost_points(board, cost_frame(results), "baseline")
    assert sorted(points.cost) == [1, 1, 3] and "times those of baseline" in label
