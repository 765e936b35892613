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


@pytest.fixture(scope="module")
def three() -> pd.DataFrame:
    pairs = (("baseline", BASELINE), ("dml", BETTER), ("one", UNCLEAR))
    return board_of(*(run for method, top1s in pairs for run in made_seeds(method, top1s)))


def test_means_equal_after_rounding_share_a_rank():
    top1s = {"a": 60.0, "b": 50.001, "c": 50.004, "d": 49.99}
    board = board_of(*(made(method, 0, top1) for method, top1 in top1s.items()))
    assert board["rank"].to_dict() == {"a": 1, "c": 2, "b": 2, "d": 4}


def test_a_row_without_a_finished_run_has_no_rank():
    lost = made("b").model_copy(update={"status": "failed", "last": None, "cost": None})
    assert pd.isna(board_of(made("a"), lost).loc["b", "rank"])


def test_differences_carry_the_statistics_of_their_comparison(three):
    values = {"baseline": BASELINE, "dml": BETTER, "one": UNCLEAR}
    by_seed = {method: dict(enumerate(top1s)) for method, top1s in values.items()}
    found = compare_pairs(by_seed, [("dml", "baseline"), ("one", "baseline")])
    for method, expected in zip(("dml", "one"), found, strict=True):
        row = three.loc[method]
        assert (row.difference, row.pairs, row.p) == (expected.difference, 8, expected.p)
        assert (row.difference_low, row.difference_high) == expected.interval
        assert row.seeds_needed == expected.seeds_needed
        assert row.sign_flip_p == expected.sign_flip_p
    assert three.verdict.to_dict() == {
        "baseline": "reference", "dml": "better", "one": "undecided"
    }  # fmt: skip
    reference = three.loc["baseline"]
    assert reference.difference == 0 and reference.reference and pd.isna(reference.p)


def test_the_students_that_do_not_differ_from_the_best_are_marked():
    top1s = {"a": BETTER, "b": [top1 - 0.05 for top1 in reversed(BETTER)], "baseline": BASELINE}
    board = board_of(*(run for method in top1s for run in made_seeds(method, top1s[method])))
    assert board.among_best.to_dict() == {"a": True, "b": True, "baseline": False}
    text = render(board.reset_index(), "latex")
    assert text.count(r"\textbf{") == 2 and "not distinguishable from the best" in text
    undecided = board_of(*made_seeds("a", UNCLEAR), *made_seeds("baseline", BASELINE))
    assert undecided.among_best.isna().all()
    assert r"\textbf" not in render(undecided.reset_index(), "latex")


def test_ranks_are_shown_if_a_difference_is_significant(three):
    def first(board: pd.DataFrame) -> str:
        return columns(board.reset_index(), None, "baseline")[0].name

    assert first(three) == "rank"
    assert first(board_of(*made_seeds("one", UNCLEAR), *made_seeds("baseline", BASELINE))) != "rank"


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
    small = made_seeds("dml", BETTER, architecture="resnet8")
    small += made_seeds("baseline", BASELINE, architecture="resnet8")
    large = made_seeds("dml", BETTER) + made_seeds("baseline", BASELINE)
    board = leaderboard(runs_frame(small + large))
    alone = leaderboard(runs_frame(small))
    assert board[board.architecture == "resnet8"].p.dropna().tolist() == alone.p.dropna().tolist()


def test_one_common_seed_decides_nothing():
    board = board_of(made("baseline", 0, 50.0), made("dml", 0, 60.0))
    row = board.loc["dml"]
    assert (row.difference, row.verdict) == (10.0, "")
    assert row[["p", "difference_low", "sign_flip_p", "seeds_needed"]].isna().all()


def test_a_seed_with_two_versions_of_the_reference_is_not_compared():
    versions = [made("baseline", 0, 40.0), made("baseline", 0, 42.0, method_hash="another0hash")]
    board = board_of(*versions, made("baseline", 1, 44.0), *made_seeds("dml", [50.0, 50.0]))
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
    ("change", "labels"),
    [
        ({"environment": {"precision": "tf32"}}, ("fp32", "tf32")),
        ({"notes": {"images": "prepared"}}, ("originals", "prepared")),
        ({"harness": 2}, ("harness 1", "harness 2")),
    ],
)
def test_rows_that_differ_in_more_than_their_method_say_so(change, labels):
    results = made_seeds("baseline", BASELINE), made_seeds("dml", BETTER)
    for i, result in enumerate(results[1]):
        update = dict(change)
        if "environment" in update:
            update["environment"] = result.environment.model_copy(update=update["environment"])
        results[1][i] = result.model_copy(update=update)
    said = "Rows with different precision, images or harness version are ranked"
    board = board_of(*results[0], *results[1])
    names = [f"baseline ({labels[0]})", f"dml ({labels[1]})"]
    assert sorted(board.index) == names and pd.isna(board.difference[names[1]])
    assert said in render(board.reset_index(), "terminal")
    assert said not in render(board_of(*results[1]).reset_index(), "terminal")
    # A mean of both kinds is none of either.
    board = board_of(*results[0], *results[1][:4], *made_seeds("dml", BETTER)[4:])
    assert board.n[f"dml ({labels[0]})"] == board.n[f"dml ({labels[1]})"] == 4


def test_csv_and_json_hold_every_value_by_seed(three):
    board = three.reset_index()
    rows = json.loads(render(board, "json"))
    assert rows[0]["student_top1_by_seed"] == {str(s): top1 for s, top1 in enumerate(BETTER)}
    cell = pd.read_csv(io.StringIO(render(board, "csv"))).student_top1_by_seed[0]
    assert json.loads(cell) == rows[0]["student_top1_by_seed"]


def test_a_board_knows_its_protocol():
    row = board_of(made("a", suite=CIFAR)).iloc[0]
    assert (row.dataset, row.classes, row.epochs, row.all_images) == ("cifar100", 100, 300, True)
    reduced = board_of(made("a")).iloc[0]
    assert (reduced.epochs, reduced.all_images) == (10, False)


def test_a_protocol_that_cannot_be_read_is_unknown():
    strange = made("a").model_copy(update={"protocol": {"name": "x"}})
    assert pd.isna(board_of(strange).epochs["a"])
    assert "50.00" in render(leaderboard(runs_frame([strange])), "terminal")


def test_rates_use_the_most_common_execution():
    """Rates of two devices are not averaged, and need another method with the same device."""
    slow, fast = {"training_seconds": 100.0}, {"training_seconds": 10.0}
    results = [
        made("a", 0, cost=slow, environment={"device": "old"}),
        made("a", 1, cost=slow, environment={"device": "old"}),
        made("a", 2, cost=fast, environment={"device": "new"}),
        made("b", 0, cost=fast, environment={"device": "new"}),
        made("c", 0, cost=slow, environment={"device": "old", "threads": 9}),
        made("d", 0, cost=slow, environment={"device": "old", "threads": 8}),
        made("d", 1, cost=slow, environment={"device": "old", "threads": 7}),
    ]
    board = leaderboard(runs_frame(results)).set_index("method")
    assert board.training_seconds[["a", "b", "c"]].tolist() == [10.0, 10.0, 100.0]
    assert math.isnan(board.training_seconds["d"]) and board.n["a"] == 3
    rates = columns(board, ["rate"], "baseline")[0]
    told = {method: rates.text(row).partition(" ")[2] for method, row in board.iterrows()}
    assert told == {
        "a": "(new, threads 1)",
        "b": "(new, threads 1)",
        "c": "(old, threads 9)",
        "d": "",
    }
