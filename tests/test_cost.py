"""Accuracy against training FLOPs, and controls at equal cost."""

import math

import pytest
from made_results import committed

from kdbench.report.cost import cost_frame, equal_cost, equal_cost_table
from kdbench.store import Metrics, Result
from kdbench.suite import Suite, load_suite


@pytest.fixture(scope="module")
def template() -> Result:
    return committed("dml")


@pytest.fixture
def make(template):
    """Results of a method with these accuracies, by seed."""

    def build(
        method: str,
        *top1: float,
        epochs: int = 10,
        flops: float | None = 1e15,
        suite: Suite | None = None,
        made: dict | None = None,
        cost: dict | None = None,
        **identity: str,
    ) -> list[Result]:
        chosen = (suite or load_suite("cifar100-reduced")).with_epochs(epochs)
        work = {"training_flops": flops and round(flops), **(cost or {})}
        named = {"method": method, "suite": chosen.name, "suite_hash": chosen.digest(), **identity}
        return [
            template.model_copy(
                update={
                    "identity": template.identity.model_copy(update=named | {"seed": seed}),
                    "protocol": chosen.model_dump(mode="json"),
                    "last": {"student": Metrics(top1=value, top5=99.0, loss=1.0)},
                    "environment": template.environment.model_copy(update=made or {}),
                    "cost": template.cost.model_copy(update=work),
                }
            )
            for seed, value in enumerate(top1)
        ]

    return build


def test_rows_are_methods_and_epochs_of_one_recipe(make):
    results = make("baseline", 60.0, 62.0) + make("baseline", 64.0, epochs=30, flops=3e15)
    results += make("ffsd", 63.0, flops=3e15)
    frame = cost_frame(results)
    assert frame.method.tolist() == ["baseline", "baseline", "ffsd"]
    assert frame.epochs.tolist() == [10, 30, 10]
    assert frame.suite.unique().tolist() == ["cifar100-reduced"] and frame.key.nunique() == 1
    assert (frame.n[0], frame.student_top1[0]) == (2, 61.0)
    assert frame.student_top1_sd[0] == pytest.approx(math.sqrt(2))
    assert frame.training_flops.tolist() == [1e15, 3e15, 3e15]


def test_other_recipes_and_precisions_are_other_groups(make):
    suite = load_suite("cifar100-reduced")
    results = make("a", 60.0)
    results += make("a", 60.0, suite=suite.with_precision("bf16"))
    results += make("a", 60.0, suite=suite.model_copy(update={"batch_size": 64}))
    results += make("a", 60.0, made={"precision": "tf32"})
    frame = cost_frame(results)
    assert len(frame) == frame.key.nunique() == 4
    assert set(frame.suite) == {"cifar100-reduced", "cifar100-reduced@precision=bf16"}


def test_a_key_is_that_of_results_made_before_a_setting_existed(make, template):
    """The committed results lack settings that came later."""
    assert "encoded" not in template.protocol["data"]
    assert cost_frame([template]).key[0] == cost_frame(make("dml", 60.0)).key[0]


def test_two_versions_of_a_method_are_two_rows(make):
    frame = cost_frame(make("a", 60.0) + make("a", 61.0, method_hash="another0hash"))
    assert "a (another0)" in frame.method.tolist() and len(frame) == 2


def test_the_front_holds_what_nothing_beats(make):
    results = make("cheap", 60.0) + make("dear", 70.0, flops=4e15)
    results += make("beaten", 59.0, flops=2e15) + make("as good for more", 60.0, flops=2e15)
    results += make("unknown", 99.0, flops=None)
    results += make("elsewhere", 10.0, architecture="resnet8")
    frame = cost_frame(results).set_index("method")
    assert set(frame.index[frame.pareto]) == {"cheap", "dear", "elsewhere"}
    assert math.isnan(frame.training_flops["unknown"])


@pytest.mark.parametrize(
    ("made", "cost", "seconds"),
    [({}, {}, 20.0), ({"device": "another"}, {}, None), ({}, {"jobs": 2}, 10.0)],
)
def test_times_are_of_runs_alone_and_made_alike(make, made, cost, seconds):
    results = make("a", 60.0, cost={"training_seconds": 10.0})
    other = make("a", 60.0, 60.0, made=made, cost={"training_seconds": 30.0, **cost})
    (found,) = cost_frame([*results, other[1]]).training_seconds
    assert found == seconds if seconds else math.isnan(found)


def test_unfinished_runs_have_no_row(make, template):
    lost = template.model_copy(update={"status": "diverged", "last": None, "cost": None})
    assert cost_frame([lost]).empty and cost_frame([]).empty
    assert equal_cost([]).empty and equal_cost_table(equal_cost([])) == ""


def test_a_control_is_the_nearest_in_flops_and_paired_by_seed(make):
    results = make("baseline", 60.0, 61.0) + make("ffsd", 66.0, 68.0, 90.0, flops=4.0e15)
    results += make("baseline", 65.0, 66.0, epochs=40, flops=4.1e15)
    results += make("baseline", 50.0, 50.0, epochs=39, flops=3.85e15)
    results += make("far", 63.0, flops=2e15) + make("unknown", 63.0, flops=None)
    found = equal_cost(results).set_index("method")
    assert set(found.index) == {"ffsd", "far", "unknown"}
    assert (found.control_epochs["ffsd"], found.control_top1["ffsd"]) == (40, 65.5)
    assert found.difference["ffsd"].values == {0: 1.0, 1: 2.0}
    for method in ("far", "unknown"):
        assert math.isnan(found.control_top1[method]) and found.difference[method] is None


@pytest.mark.parametrize(("flops", "near"), [(1.049e15, True), (1.051e15, False)])
def test_equal_cost_is_within_five_per_cent(make, flops, near):
    results = make("ffsd", 60.0) + make("baseline", 60.0, epochs=30, flops=flops)
    assert equal_cost(results).control_top1.notna().tolist() == [near]


def test_a_control_may_be_another_method_and_never_of_another_precision(make):
    results = make("ffsd", 60.0) + make("independent", 61.0, epochs=12)
    assert equal_cost(results, "independent").control_top1.tolist() == [61.0]
    results = make("ffsd", 60.0) + make("baseline", 61.0, made={"precision": "tf32"})
    assert equal_cost(results).control_top1.isna().all()


def test_the_table_shows_groups_that_have_a_control(make):
    results = make("ffsd", 66.0, 68.0, flops=4e15) + make("far", 63.0)
    assert equal_cost_table(equal_cost(results)) == ""
    results += make("baseline", 65.0, 66.0, epochs=40, flops=4e15)
    results += make("ffsd", 60.0, architecture="resnet8")
    text = equal_cost_table(equal_cost(results), markdown=True)
    assert text.startswith("### cifar100-reduced, resnet20: baseline trained for as many FLOPs\n")
    assert "resnet8" not in text
    cells = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in text.splitlines()[4:]}
    row = [cell.strip() for cell in cells["ffsd"]]
    assert row == [
        "10", "67.00", "4.000", "65.50", "40", "+1.50", "-4.85 to +7.85", "0.500", "2"
    ]  # fmt: skip
    assert [cell.strip() for cell in cells["far"]][3:] == ["n/a"] * 5 + ["0"]
