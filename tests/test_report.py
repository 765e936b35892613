"""Tests of statistics and tables, and of results on disk."""

import math

import pandas as pd
import pytest
from made_results import LOST, made, made_seeds, metrics, saved

from kdbench import atomic
from kdbench.errors import UserError
from kdbench.launch.execution import without_paths
from kdbench.report.analysis.cost import cost_frame
from kdbench.report.analysis.summary import leaderboard, runs_frame
from kdbench.report.tables.render import render
from kdbench.results.files import DamagedFile, iter_results, read_result, write_result
from kdbench.results.schema import Result, best_on_test


def test_mean_and_sample_deviation_over_seeds():
    row = leaderboard(runs_frame(made_seeds("dml", [70.0, 72.0, 74.0]))).iloc[0]
    assert (row.n, row.student_top1) == (3, 72.0)
    assert row.student_top1_sd == pytest.approx(2.0)  # divided by n - 1


def test_the_first_of_equally_good_epochs_is_the_best():
    (epoch,) = made("dml").history
    epochs = [
        epoch.model_copy(update={"epoch": number, "metrics": {"student": metrics(top1)}})
        for number, top1 in enumerate((50.0, 60.0, 60.0, 55.0), start=1)
    ]
    best = best_on_test(epochs)
    assert best is not None and (best.epoch, best.metrics["student"].top1) == (2, 60.0)
    assert best_on_test([]) is None


def test_differences_are_paired_by_seed():
    results = made_seeds("baseline", [60.0, 70.0, 80.0])
    results += made_seeds("dml", [71.0, 82.0, 99.0], first=1)
    board = leaderboard(runs_frame(results)).set_index("method")
    assert board.difference.to_dict() == {"dml": pytest.approx(1.5), "baseline": 0}
    without = leaderboard(runs_frame(results), against="independent")
    assert without.difference.isna().all()


def test_rows_are_ordered_by_student_accuracy_with_missing_values_last():
    results = [made("a", 0, 50.0), made("b", 0, 60.0), made("c").model_copy(update=LOST)]
    board = leaderboard(runs_frame(results))
    assert board.method.tolist() == ["b", "a", "c"]
    assert board["rank"].tolist()[:2] == [1, 2] and pd.isna(board["rank"][2])
    text = render(board, "terminal")
    assert "50.00 ± n/a" in text
    lost = next(line for line in text.splitlines() if line.split()[:1] == ["c"])
    assert "0 (1 diverged)" in lost and lost.count("n/a") >= 6


def test_two_versions_of_a_method_are_two_rows():
    results = [made("a", 0, 50.0), made("a", 1, 60.0, method_hash="another0hash")]
    for frame in (leaderboard(runs_frame(results)), cost_frame(results)):
        assert frame.n.tolist() == [1, 1]
        assert "a (another0)" in frame.method.tolist()


def test_a_copy_of_a_result_does_not_count_twice(tmp_path):
    file = saved(tmp_path)
    copy = file.with_name("seed0 (1).json")
    copy.write_bytes(file.read_bytes())
    found = {type(item): item for item in iter_results(tmp_path)}
    assert found[DamagedFile].file == copy and "belongs at" in found[DamagedFile].reason
    assert found[Result].identity.seed == 0


def test_runs_of_different_precisions_are_not_compared():
    results = [made("baseline"), made("b", environment={"precision": "bf16"})]
    assert math.isnan(leaderboard(runs_frame(results)).set_index("method").difference["b (bf16)"])


def test_two_recipes_of_one_name_are_two_leaderboards():
    board = leaderboard(runs_frame([made("a"), made("a", suite_hash="another0hash")]))
    assert len(board) == 2
    assert "cifar100-reduced (another0), resnet20" in render(board, "terminal")


def test_waiting_has_a_column_where_it_was_measured():
    plain, waited = made("a"), made("b", 0, 40.0, cost={"waiting_share": 0.25})
    assert "waiting" not in render(leaderboard(runs_frame([plain])), "terminal")
    head, _, *rows = render(leaderboard(runs_frame([plain, waited])), "markdown").splitlines()[2:6]
    column = head.split("|").index(next(c for c in head.split("|") if "waiting" in c))
    assert [row.split("|")[column].strip() for row in rows] == ["n/a", "25%"]


def test_a_result_survives_the_disk(tmp_path):
    result = made("a", 3)
    file = write_result(tmp_path, result)
    assert file == tmp_path / "cifar100-reduced/resnet20/a/seed3.json"
    assert read_result(file) == result
    assert list(iter_results(tmp_path)) == [result]
    assert list(tmp_path.rglob("*.tmp")) == []


def test_a_failed_write_leaves_the_old_result_whole(tmp_path, monkeypatch):
    file = write_result(tmp_path, made("a", 0, 50.0))
    before = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_result(tmp_path, made("a", 0, 60.0))
    assert file.read_bytes() == before
    assert list(tmp_path.rglob("*.tmp")) == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c.pop("identity"), "'identity' is missing"),
        (lambda c: c.update(schema_version=2), "schema_version"),
        (lambda c: c.update(statsu="finished"), "unknown key 'statsu'. Did you mean 'status'?"),
        (lambda c: c["last"]["student"].update(top1="high"), "last.student.top1"),
    ],
)
def test_a_damaged_result_says_why(tmp_path, change, words):
    found = read_result(saved(tmp_path, change))
    assert isinstance(found, DamagedFile) and words in found.reason


def test_messages_omit_folders_of_the_machine():
    text = "OSError: cannot open /home/me/data/train.bin: no /tmp/x or rate 3/4"
    assert without_paths(text) == "OSError: cannot open train.bin: no x or rate 3/4"


def test_measured_costs_are_plausible(make_run, suite):
    """A backward pass costs two forward passes, without the gradient of the images."""
    result = make_run("independent", changed_suite=suite.with_epochs(1)).train()
    cost = result.cost
    assert (cost.parameters_deployed, cost.parameters_trained) == (78_042, 3 * 78_042)
    assert cost.peak_memory_kind == "process" and cost.peak_memory_bytes > 100 * 2**20
    assert cost.training_seconds > 0 and cost.evaluation_seconds > 0
    seen = result.protocol["batch_size"] * 4  # steps of the one epoch
    forward = 3 * cost.student_forward_flops * seen
    assert 2.9 * forward < cost.training_flops < 3 * forward
