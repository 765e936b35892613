"""Tests of statistics and tables, and of results on disk."""

import io
import json
import math

import pandas as pd
import pytest
from conftest import Watcher
from made_results import metrics, one_epoch

from kdbench import atomic
from kdbench.discovery import find_methods
from kdbench.engine.run import Run
from kdbench.engine.spec import RunSpec
from kdbench.errors import UserError
from kdbench.launch.execution import without_paths
from kdbench.report.analysis.summary import leaderboard, runs_frame
from kdbench.report.tables.render import render
from kdbench.results.files import DamagedFile, iter_results, read_result, write_result
from kdbench.results.schema import Result, best_on_test


@pytest.fixture(scope="module")
def template(suite, images, accelerator, tmp_path_factory) -> Result:
    """A real result from which others are created."""
    (entry,) = find_methods(["independent"])
    spec = RunSpec(suite.with_epochs(1), "resnet8", entry, entry.options({}), 0)
    folder = tmp_path_factory.mktemp("template")
    return Run(spec, *images, folder, accelerator, Watcher()).train()


@pytest.fixture
def make(template):
    def build(method: str, seed: int, top1: float | None, **identity: str) -> Result:
        changes = {"method": method, "seed": seed, **identity}
        changed = {"identity": template.identity.model_copy(update=changes)}
        if top1 is None:
            changed |= {"status": "diverged", "reason": "'ce' is nan in epoch 1", "last": None}
        else:
            changed |= one_epoch({"student": metrics(top1)})
        return template.model_copy(update=changed)

    return build


def test_mean_and_sample_deviation_over_seeds(make):
    results = [make("dml", seed, top1) for seed, top1 in enumerate((70.0, 72.0, 74.0))]
    row = leaderboard(runs_frame(results)).iloc[0]
    assert (row.n, row.student_top1) == (3, 72.0)
    assert row.student_top1_sd == pytest.approx(2.0)  # divided by n - 1


def test_the_first_of_equally_good_epochs_is_the_best(template):
    epochs = [
        template.history[0].model_copy(
            update={"epoch": epoch, "metrics": {"student": metrics(top1)}}
        )
        for epoch, top1 in enumerate((50.0, 60.0, 60.0, 55.0), start=1)
    ]
    best = best_on_test(epochs)
    assert best is not None and (best.epoch, best.metrics["student"].top1) == (2, 60.0)
    assert best_on_test([]) is None


def test_differences_are_paired_by_seed(make):
    results = [make("baseline", s, top1) for s, top1 in enumerate((60.0, 70.0, 80.0))]
    results += [make("dml", s, top1) for s, top1 in {1: 71.0, 2: 82.0, 3: 99.0}.items()]
    board = leaderboard(runs_frame(results)).set_index("method")
    assert board.difference["dml"] == pytest.approx(1.5)
    assert board.difference["baseline"] == 0
    without = leaderboard(runs_frame(results), against="independent")
    assert without.difference.isna().all()


def test_rows_are_ordered_by_student_accuracy_with_missing_values_last(make):
    results = [make("a", 0, 50.0), make("b", 0, 60.0), make("c", 0, None)]
    board = leaderboard(runs_frame(results))
    assert board.method.tolist() == ["b", "a", "c"]
    text = render(board, "terminal")
    assert "50.00 ± n/a" in text
    lost = next(line for line in text.splitlines() if line.split()[:1] == ["c"])
    assert "0 (1 diverged)" in lost and lost.count("n/a") >= 6


def test_two_versions_of_a_method_are_two_rows(make):
    results = [make("a", 0, 50.0), make("a", 1, 60.0, method_hash="another0hash")]
    board = leaderboard(runs_frame(results))
    assert board.n.tolist() == [1, 1]
    assert "a (another0)" in board.method.tolist()


def test_a_copy_of_a_result_does_not_count_twice(make, tmp_path):
    file = write_result(tmp_path, make("a", 0, 50.0))
    copy = file.with_name("seed0 (1).json")
    copy.write_bytes(file.read_bytes())
    found = {type(item): item for item in iter_results(tmp_path)}
    assert found[DamagedFile].file == copy and "belongs at" in found[DamagedFile].reason
    assert found[Result].identity.seed == 0


def test_runs_of_different_precisions_are_not_compared(make):
    other = make("b", 0, 60.0)
    made = other.environment.model_copy(update={"precision": "bf16"})
    results = [make("baseline", 0, 50.0), other.model_copy(update={"environment": made})]
    assert math.isnan(leaderboard(runs_frame(results)).set_index("method").difference["b (bf16)"])


def test_two_recipes_of_one_name_are_two_leaderboards(make):
    results = [make("a", 0, 50.0), make("a", 0, 60.0, suite_hash="another0hash")]
    board = leaderboard(runs_frame(results))
    assert len(board) == 2
    assert "tiny@epochs=1 (another0), resnet8" in render(board, "terminal")


def test_waiting_has_a_column_where_it_was_measured(make):
    plain = make("a", 0, 50.0)
    assert "waiting" not in render(leaderboard(runs_frame([plain])), "terminal")
    cost = plain.cost.model_copy(update={"waiting_share": 0.25})
    waited = make("b", 0, 40.0).model_copy(update={"cost": cost})
    head, _, *rows = render(leaderboard(runs_frame([plain, waited])), "markdown").splitlines()[2:6]
    column = head.split("|").index(next(c for c in head.split("|") if "waiting" in c))
    assert [row.split("|")[column].strip() for row in rows] == ["n/a", "25%"]


def test_csv_and_json_hold_unrounded_numbers(make):
    board = leaderboard(runs_frame([make("a", 0, 50.123456789)]))
    assert pd.read_csv(io.StringIO(render(board, "csv"))).student_top1[0] == 50.123456789
    assert json.loads(render(board, "json"))[0]["student_top1"] == pytest.approx(50.123456789)


def test_a_result_survives_the_disk(make, tmp_path):
    result = make("a", 3, 50.0)
    file = write_result(tmp_path, result)
    assert file == tmp_path / "tiny@epochs=1/resnet8/a/seed3.json"
    assert read_result(file) == result
    assert list(iter_results(tmp_path)) == [result]
    assert list(tmp_path.rglob("*.tmp")) == []


def test_a_failed_write_leaves_the_old_result_whole(make, tmp_path, monkeypatch):
    file = write_result(tmp_path, make("a", 0, 50.0))
    before = file.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(atomic.os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write_result(tmp_path, make("a", 0, 60.0))
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
def test_a_damaged_result_says_why(make, tmp_path, change, words):
    file = write_result(tmp_path, make("a", 0, 50.0))
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    found = read_result(file)
    assert isinstance(found, DamagedFile)
    assert words in found.reason


def test_messages_omit_folders_of_the_machine():
    text = "OSError: cannot open /home/me/data/train.bin: no /tmp/x or rate 3/4"
    assert without_paths(text) == "OSError: cannot open train.bin: no x or rate 3/4"


def test_measured_costs_are_plausible(template):
    cost = template.cost
    assert cost.parameters_deployed == 78_042
    assert cost.parameters_trained == 3 * 78_042
    assert cost.peak_memory_kind == "process" and cost.peak_memory_bytes > 100 * 2**20
    assert cost.training_seconds > 0 and cost.evaluation_seconds > 0


def test_training_work_is_forward_and_backward_of_all_networks(template):
    """A backward pass costs two forward passes, without the gradient of the images."""
    seen = template.protocol["batch_size"] * 4  # steps of the one epoch
    forward = 3 * template.cost.student_forward_flops * seen
    assert 2.9 * forward < template.cost.training_flops < 3 * forward
