"""Tests of rank, paired statistics and cost of a leaderboard's rows."""

import io
import json
import math

import pandas as pd
import pytest
from made_results import CIFAR, made, made_seeds

from kdbench.report.analysis.inference import compare_pairs
from kdbench.report.analysis.summary import leaderboard, runs_frame
from kdbench.report.tables.columns import columns
from kdbench.report.tables.render import render
from kdbench.results.schema import TRAINED_BEFORE

BASELINE = [70.0, 70.4, 70.1, 69.9, 70.2, 70.3, 70.0, 70.1]
BETTER = [72.1, 72.3, 72.2, 71.8, 72.4, 72.1, 72.2, 72.0]
UNCLEAR = [70.3, 70.2, 70.4, 69.8, 70.5, 70.2, 70.1, 70.3]


def board_of(*results, against="baseline") -> pd.DataFrame:
    return leaderboard(runs_frame(results), against).set_index("method")


def board_by_seed(**top1s: list[float]) -> pd.DataFrame:
    """Return the leaderboard of methods with these accuracies, one per seed."""
    return board_of(*(run for method in top1s for run in made_seeds(method, top1s[method])))


@pytest.fixture(scope="module")
def three() -> pd.DataFrame:
    return board_by_seed(baseline=BASELINE, dml=BETTER, one=UNCLEAR)


def test_means_equal_after_rounding_share_a_rank():
    top1s = {"a": 60.0, "b": 50.001, "c": 50.004, "d": 49.99}
    board = board_of(*(made(method, 0, top1) for method, top1 in top1s.items()))
    assert board["rank"].to_dict() == {"a": 1, "c": 2, "b": 2, "d": 4}


def test_differences_carry_the_statistics_of_their_comparison(three):
    values = {"baseline": BASELINE, "dml": BETTER, "one": UNCLEAR}
    by_seed = {method: dict(enumerate(top1s)) for method, top1s in values.items()}
    found = compare_pairs(by_seed, [("dml", "baseline"), ("one", "baseline")])
    for method, expected in zip(("dml", "one"), found, strict=True):
        row = three.loc[method]
        assert row.pairs == 8 and (row.difference_low, row.difference_high) == expected.interval
        for name in ("difference", "p", "seeds_needed", "sign_flip_p"):
            assert row[name] == getattr(expected, name)
    assert three.verdict[["baseline", "dml", "one"]].tolist() == [
        "reference",
        "better",
        "undecided",
    ]
    reference = three.loc["baseline"]
    assert reference.difference == 0 and reference.reference and pd.isna(reference.p)


def test_the_students_that_do_not_differ_from_the_best_are_marked():
    alike = [top1 - 0.05 for top1 in reversed(BETTER)]
    board = board_by_seed(a=BETTER, b=alike, baseline=BASELINE)
    assert board.among_best.to_dict() == {"a": True, "b": True, "baseline": False}
    text = render(board.reset_index(), "latex")
    assert text.count(r"\textbf{") == 2 and "not distinguishable from the best" in text
    undecided = board_by_seed(a=UNCLEAR, baseline=BASELINE)
    assert undecided.among_best.isna().all()
    assert r"\textbf" not in render(undecided.reset_index(), "latex")


def test_ranks_are_shown_if_a_difference_is_significant(three):
    undecided = board_by_seed(one=UNCLEAR, baseline=BASELINE)
    for board, ranked in ((three, True), (undecided, False)):
        first = columns(board.reset_index(), None, "baseline")[0].name
        assert (first == "rank") is ranked


def test_a_student_that_is_the_references_network_is_not_compared():
    runs = made_seeds("baseline", BASELINE) + made_seeds("dml", BETTER)
    board = board_of(*runs, *made_seeds("independent", BASELINE))
    row = board.loc["independent"]
    assert (row.verdict, row.difference, row.pairs) == ("identical by construction", 0, 8)
    assert pd.isna(row.p)
    assert board.difference_low["dml"] == board_of(*runs).difference_low["dml"]
    almost = made_seeds("independent", BASELINE)
    metrics = almost[3].last["student"].model_copy(update={"loss": 1.1})
    almost[3] = almost[3].model_copy(update={"last": {"student": metrics}})
    assert board_of(*runs, *almost).verdict["independent"] == "undecided"


def test_boards_are_compared_separately():
    large = made_seeds("dml", BETTER) + made_seeds("baseline", BASELINE)
    small = made_seeds("dml", BETTER, architecture="resnet8")
    small += made_seeds("baseline", BASELINE, architecture="resnet8")
    board = board_of(*small, *large)
    assert board[board.architecture == "resnet8"].p["dml"] == board_of(*small).p["dml"]


def test_one_common_seed_decides_nothing():
    board = board_of(made("baseline", 0, 50.0), made("dml", 0, 60.0))
    row = board.loc["dml"]
    assert (row.difference, row.verdict) == (10.0, "")
    assert row[["p", "difference_low", "sign_flip_p", "seeds_needed"]].isna().all()


def test_a_seed_with_two_versions_of_the_reference_is_not_compared():
    other = made("baseline", 0, 42.0, method_hash="another0hash")
    board = board_of(other, *made_seeds("baseline", [40.0, 44.0]), *made_seeds("dml", [50.0] * 2))
    assert (board.difference["dml"], board.pairs["dml"]) == (6.0, 1)


def test_peers_are_the_mean_of_the_networks_that_are_not_deployed():
    board = board_of(made("a", 0, 50.0, peers=(60.0, 70.0)), made("b", 0, 40.0))
    assert board.peers_top1["a"] == 65.0 and pd.isna(board.peers_top1["b"])


def test_cost_is_relative_in_flops_wherever_a_run_has_them():
    old, new = made("dml", 0), made("dml", 1, cost={"training_flops": 3 * 10**19})
    board = board_of(made("baseline", cost={"training_flops": 10**19}), old, new, made("one"))
    assert board.cost["dml"] == 3 and board.cost["baseline"] == 1
    assert pd.isna(board.cost["one"])
    assert board_of(old, new, against="one").cost.isna().all()


def test_gpu_hours_count_all_gpus_of_undisturbed_runs():
    gpu = {"training_seconds": 3600.0, "peak_memory_kind": "device"}
    shared = gpu | {"jobs": 4, "training_seconds": 9999.0}
    board = board_of(
        made("dml", 0, cost=gpu, environment={"processes": 2}),
        made("dml", 1, cost=shared, environment={"processes": 2}),
        made("one", 0, cost={"training_seconds": 1800.0}, environment={"processes": 2}),
    )
    assert board.hours["dml"] == 2.0
    assert board.hours["one"] == 0.5  # a CPU's cores are no devices


def test_a_run_on_several_machines_has_no_rate_or_time():
    moved = made("dml", cost={"images_per_second": 1.0})
    moved = moved.model_copy(update={"notes": {TRAINED_BEFORE: ["elsewhere: to step 6 of 12"]}})
    board = board_of(made("baseline"), moved)
    measured = ["images_per_second", "peak_memory_bytes", "training_seconds", "hours"]
    assert board.loc["dml", measured].isna().all() and board.loc["baseline", measured].notna().all()
    text = render(board.reset_index(), "terminal")
    assert "training moved between machines: dml." in text
    assert " moved " in text
    stays = made("dml", 1, cost={"images_per_second": 100.0})
    assert board_of(made("baseline"), moved, stays).images_per_second["dml"] == 100


@pytest.mark.parametrize(
    ("changes", "update", "labels"),
    [
        ({"environment": {"precision": "tf32"}}, {}, ("fp32", "tf32")),
        ({}, {"notes": {"images": "prepared"}}, ("originals", "prepared")),
        ({}, {"harness": 2}, ("harness 1", "harness 2")),
    ],
)
def test_rows_that_differ_in_more_than_their_method_say_so(changes, update, labels):
    baseline = made_seeds("baseline", BASELINE)
    other = [run.model_copy(update=update) for run in made_seeds("dml", BETTER, **changes)]
    said = "different precision, images, data or harness version"
    board = board_of(*baseline, *other)
    names = [f"baseline ({labels[0]})", f"dml ({labels[1]})"]
    assert sorted(board.index) == names and pd.isna(board.difference[names[1]])
    assert said in render(board.reset_index(), "terminal")
    assert said not in render(board_of(*other).reset_index(), "terminal")
    # A mean of both kinds is none of either.
    board = board_of(*baseline, *other[:4], *made_seeds("dml", BETTER)[4:])
    assert board.n[f"dml ({labels[0]})"] == board.n[f"dml ({labels[1]})"] == 4


def test_csv_and_json_hold_every_value_unrounded():
    board = board_of(*made_seeds("a", [50.123456789, 60.123456789])).reset_index()
    (row,) = json.loads(render(board, "json"))
    (cells,) = pd.read_csv(io.StringIO(render(board, "csv"))).itertuples()
    mean = pytest.approx(55.123456789, rel=1e-10)
    assert row["student_top1"] == mean and cells.student_top1 == mean
    by_seed = {"0": 50.123456789, "1": 60.123456789}
    assert row["student_top1_by_seed"] == json.loads(cells.student_top1_by_seed) == by_seed


def test_a_board_knows_its_protocol():
    whole, reduced = (board_of(made("a", suite=suite)).iloc[0] for suite in (CIFAR, None))
    assert (whole.dataset, whole.classes) == ("cifar100", 100)
    assert [(row.epochs, row.all_images) for row in (whole, reduced)] == [(300, True), (10, False)]


def test_a_protocol_that_cannot_be_read_is_unknown():
    strange = made("a").model_copy(update={"protocol": {"name": "x"}})
    assert pd.isna(board_of(strange).epochs["a"])
    assert "50.00" in render(leaderboard(runs_frame([strange])), "terminal")


def test_rates_use_the_most_common_execution():
    """Rates of two devices are not averaged, and need another method with the same device."""
    runs = [
        ("a", 0, 100.0, {"device": "old"}),
        ("a", 1, 100.0, {"device": "old"}),
        ("a", 2, 10.0, {"device": "new"}),
        ("b", 0, 10.0, {"device": "new"}),
        ("c", 0, 100.0, {"device": "old", "threads": 9}),
        ("d", 0, 100.0, {"device": "old", "threads": 8}),
        ("d", 1, 100.0, {"device": "old", "threads": 7}),
    ]
    board = board_of(
        *(
            made(method, seed, cost={"training_seconds": seconds}, environment=where)
            for method, seed, seconds, where in runs
        )
    )
    assert board.training_seconds[["a", "b", "c"]].tolist() == [10.0, 10.0, 100.0]
    assert math.isnan(board.training_seconds["d"]) and board.n["a"] == 3
    rates = columns(board, ["rate"], "baseline")[0]
    told = {method: rates.text(row).partition(" ")[2] for method, row in board.iterrows()}
    new = "(new, threads 1)"
    assert told == {"a": new, "b": new, "c": "(old, threads 9)", "d": ""}
