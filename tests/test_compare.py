"""Tests of `kdbench compare` with folders, revisions and methods."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import is_one_sentence
from made_results import committed, metrics, one_epoch

from kdbench.report.analysis.compare import compare, render
from kdbench.report.analysis.inference import compare_pairs
from kdbench.results.files import read_result, write_result
from kdbench.results.schema import TRAINED_BEFORE, Result


@pytest.fixture(scope="module")
def template() -> Result:
    return committed("dml")


@pytest.fixture
def save(template):
    """Return a function that writes results of a method with given accuracies by seed."""

    def write(
        folder: str,
        method: str,
        *top1: float,
        made: dict | None = None,
        cost: dict | None = None,
        run: dict | None = None,
        **identity: str,
    ) -> None:
        for seed, value in enumerate(top1):
            changes = {"method": method, "seed": seed, **identity}
            result = template.model_copy(
                update={
                    "identity": template.identity.model_copy(update=changes),
                    "environment": template.environment.model_copy(update=made or {}),
                    "cost": template.cost.model_copy(update=cost or {}),
                }
                | one_epoch({"student": metrics(value)})
                | (run or {})
            )
            write_result(Path(folder), result)

    return write


@pytest.fixture
def compared():
    """Return the rows by method, or by architecture if methods are compared."""

    def rows(a: str = "a", b: str = "b"):
        found = compare(a, b, Path("results"))
        return {row.method or row.architecture: row for row in found.rows}

    return rows


BETTER = [70.0, 70.2, 70.1, 70.4, 70.3, 70.2, 70.5, 70.1]

UP = [top1 + 2 + seed / 10 for seed, top1 in enumerate(BETTER)]
DOWN = [top1 - 1 - seed / 10 for seed, top1 in enumerate(BETTER)]
NOISE = [top1 + (-1) ** seed / 2 for seed, top1 in enumerate(BETTER)]


def test_differences_are_paired_adjusted_and_sorted_by_evidence(save, compared):
    for method in ("up", "down", "noise", "same"):
        save("a", method, *BETTER)
    save("b", "up", *UP)
    save("b", "down", *DOWN)
    save("b", "noise", *NOISE)
    save("b", "same", *BETTER)
    rows = compared()
    assert list(rows) == ["up", "down", "noise", "same"]
    verdicts = [row.verdict for row in rows.values()]
    assert verdicts == ["better", "worse", "not distinguishable", "identical"]
    changes = {"up": UP, "down": DOWN, "noise": NOISE}
    values = {("a", method): dict(enumerate(BETTER)) for method in changes}
    values |= {("b", method): dict(enumerate(top1s)) for method, top1s in changes.items()}
    expected = compare_pairs(values, [(("b", method), ("a", method)) for method in changes])
    for row, found in zip(rows.values(), expected, strict=False):  # without the identical one
        assert (row.difference, row.p) == (found.difference, pytest.approx(found.p))
        assert row.interval == pytest.approx(found.interval)
        assert row.seeds_needed == found.seeds_needed
    text = render(compare("a", "b", Path("results")), "terminal")
    assert text.endswith("\n1 better, 1 worse, 1 not distinguishable, 1 identical\n")


def test_three_seeds_decide_a_large_difference_only(save, compared):
    save("a", "dml", 60.0, 60.1, 60.2)
    save("b", "dml", 60.0, 60.2, 60.5)
    assert compared()["dml"].verdict == "not distinguishable"
    text = render(compare("a", "b", Path("results")), "terminal")
    assert "not distinguishable at n = 3 (needs 13)" in text and "+0.13" in text
    save("b", "dml", 70.0, 70.2, 70.5)
    assert compared()["dml"].verdict == "better"


def test_only_common_seeds_count(save, compared):
    save("a", "dml", 60.0, 70.0)
    save("b", "dml", 61.0, 72.0, 99.0)
    row = compared()["dml"]
    assert (row.n, row.a, row.b) == (2, 65.0, 66.5)
    assert row.notes == ["1 seed only in B"]


def test_costs_are_of_common_seeds(save, compared):
    save("a", "dml", 60.0, cost={"images_per_second": 100.0, "peak_memory_bytes": 1000})
    save("b", "dml", 60.0, 61.0, cost={"images_per_second": 200.0, "peak_memory_bytes": 5000})
    save("b", "dml", 60.0, cost={"images_per_second": 200.0, "peak_memory_bytes": 2000})
    row = compared()["dml"]
    assert (row.rate, row.memory) == (2.0, 2.0)


def test_equal_accuracies_of_other_runs_are_not_identical(save, compared):
    save("a", "dml", 60.0)
    save("b", "dml", 60.0)
    assert compared()["dml"].verdict == "identical"
    file = Path("b/cifar100-reduced/resnet20/dml/seed0.json")
    found = read_result(file)
    epoch = found.history[0].model_copy(update={"losses": {"ce/student": 2.0}})
    write_result(Path("b"), found.model_copy(update={"history": [epoch]}))
    assert compared()["dml"].verdict == "not distinguishable"


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"suite_hash": "another"}, "another suite hash"),
        ({"made": {"precision": "bf16"}}, "another precision"),
    ],
)
def test_other_recipes_are_not_compared(save, change, note):
    save("a", "dml", 60.0)
    save("b", "dml", 61.0, **change)
    rows = compare("a", "b", Path("results")).rows
    assert sorted(row.verdict for row in rows) == ["only in A", "only in B"]
    assert all(row.notes == [note] and row.difference is None for row in rows)


def test_missing_and_unfinished_runs_of_one_side_are_reported(save, compared, template):
    save("a", "dml", 60.0)
    save("a", "one", 60.0)
    save("b", "dml", 61.0, method_hash="another")
    save("b", "kdcl", 60.0)
    failed = {"status": "diverged", "last": None}
    identity = template.identity.model_copy(update={"method": "dml", "seed": 1})
    write_result(Path("b"), template.model_copy(update={"identity": identity, **failed}))
    rows = compared()
    assert rows["one"].verdict == "only in A" and rows["kdcl"].verdict == "only in B"
    assert rows["dml"].notes == ["another method hash", "1 diverged in B"]
    assert rows["dml"].n == 1
    save("a", "ffsd", 60.0)
    save("b", "ffsd", 60.0, run=failed)
    assert compared()["ffsd"].notes == ["1 diverged in B"]  # of no version that is known


@pytest.mark.parametrize(
    ("made", "cost", "notes", "ratio"),
    [
        ({}, {}, {}, 2.0),
        ({"device": "another"}, {}, {}, None),
        ({"step": "graph"}, {}, {}, None),
        ({"threads": 64}, {}, {}, None),
        ({}, {"jobs": 2}, {}, None),
        ({}, {}, {TRAINED_BEFORE: ["elsewhere"]}, None),
    ],
)
def test_costs_are_ratios_where_runs_were_executed_alike(save, compared, made, cost, notes, ratio):
    save("a", "dml", 60.0, cost={"images_per_second": 100.0, "peak_memory_bytes": 1000})
    both = {"images_per_second": 200.0, "peak_memory_bytes": 2000}
    save("b", "dml", 60.0, made=made, cost=both | cost, run={"notes": notes})
    assert (compared()["dml"].rate, compared()["dml"].memory) == (ratio, ratio)


def test_two_methods_are_compared_by_architecture(save, compared):
    save("results", "dml", 60.0, 60.0)
    save("results", "ffsd", 61.0, 62.0, method_hash="another")
    save("results", "ffsd", 61.0, architecture="resnet32")
    rows = compared("dml", "ffsd")
    assert rows["resnet20"].difference == 1.5
    assert rows["resnet20"].notes == []  # that two methods differ is no news
    assert rows["resnet32"].verdict == "only in B"


def test_several_versions_are_reported(save, compared):
    save("results", "dml", 60.0, 60.0)
    save("results", "ffsd", 61.0, 62.0)
    save("results", "ffsd", 61.0, method_hash="another")
    assert compared("dml", "ffsd")["resnet20"].notes == ["more than one version in B"]
    save("a", "dml", 60.0)
    save("b", "dml", 61.0, run={"harness": 2})
    assert compared()["dml"].notes == ["another harness version"]


def git(*arguments: str) -> None:
    who = ["-c", "user.name=n", "-c", "user.email=e"]
    subprocess.run(["git", *who, *arguments], check=True, capture_output=True)


def test_a_revision_with_a_link_out_of_its_folder_is_refused(save, kdbench):
    git("init")
    save("results", "dml", 60.0)
    Path("results/link").symlink_to("/etc")
    git("add", "results")
    git("commit", "-m", "first")
    code, _, err = kdbench("compare", "HEAD", "HEAD")
    assert code == 2 and is_one_sentence(err) and "Revision 'HEAD' cannot be read" in err


def test_revisions_are_read_without_a_checkout(save, kdbench):
    git("init")
    save("results", "dml", 60.0)
    bad = Path("results/cifar100-reduced/resnet20/one/seed0.json")
    bad.parent.mkdir(parents=True)
    bad.write_text("{")
    git("add", "results")
    git("commit", "-m", "first")
    save("results", "dml", 61.0)
    bad.unlink()
    git("commit", "-am", "second")
    shutil.rmtree("results")
    code, out, err = kdbench("compare", "HEAD~1", "HEAD", "--format", "json")
    assert code == 2  # for the damaged file, as of `report`
    assert is_one_sentence(err) and f"'HEAD~1:{bad}' is not valid and was skipped" in err
    (row,) = json.loads(out)["rows"]
    assert (row["a"], row["b"], row["difference"]) == (60.0, 61.0, 1.0)
    assert not Path("results").exists()


def test_formats(save, kdbench):
    save("a", "dml", 60.0)
    save("b", "dml", 61.0)
    code, out, err = kdbench("compare", "a", "b", "--format", "markdown")
    assert (code, err) == (0, "")
    assert out.startswith("### A: a, B: b\n") and "| cifar100-reduced | resnet20" in out
    content = json.loads(kdbench("compare", "a", "b", "--format", "json")[1])
    assert content["summary"]["not distinguishable"] == 1
    assert content["rows"][0]["interval"] is None


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("dml", "dmml"), "'dmml' is neither a folder, nor a method with results"),
        (("dml", "dmml"), "Did you mean 'dml'?"),
        (("dml", "empty"), "'dml' is a method but 'empty' is not"),
        (("empty", "empty"), "'empty' has no results"),
        (("dml", "--", "-x"), "'-x' is neither a folder"),
    ],
)
def test_incomparable_inputs_print_one_sentence(save, kdbench, names, words):
    save("results", "dml", 60.0)
    Path("empty").mkdir()
    code, out, err = kdbench("compare", *names)
    assert (code, out) == (2, "")
    assert is_one_sentence(err) and words in err
