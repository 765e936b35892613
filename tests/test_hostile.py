"""Invalid and malicious files are rejected or escaped, and the rest is shown."""

import json
import os
from pathlib import Path

import pytest
from made_results import made, saved

from kdbench.report.analysis.summary import leaderboard, runs_frame
from kdbench.report.command import make_report
from kdbench.report.tables.render import render
from kdbench.results.files import DamagedFile, iter_results, write_result
from kdbench.results.schema import Result
from kdbench.suite.load import load_suite

ESCAPE = "\x1b[31mred\x07"


def set_in(*path: str | int, to):
    def change(content):
        for key in path[:-1]:
            content = content[key]
        content[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (set_in("schema_version", to=2), "written by a newer kdbench (schema_version 2"),
        (set_in("identity", "method", to=ESCAPE), "identity.method: must be a folder name"),
        (set_in("identity", "suite", to="../../x"), "identity.suite: must be a folder name"),
        (
            set_in("identity", "architecture", to="/etc"),
            "identity.architecture: must be",
        ),
        (set_in("identity", "suite", to=".."), "identity.suite: must be a folder name"),
        (set_in("identity", "seed", to=10**30), "identity.seed"),
        (set_in("last", "student", "top1", to="70.0"), "last.student.top1"),
        (set_in("last", "student", "top1", to=float("nan")), "last.student.top1"),
        (set_in("last", "student", "top1", to=float("inf")), "last.student.top1"),
        (set_in("last", "student", "top1", to=170.0), "last.student.top1"),
        (set_in("cost", "training_seconds", to=float("inf")), "cost.training_seconds"),
        (set_in("cost", "parameters_trained", to=10**400), "cost.parameters_trained"),
        (set_in("last", "student", "top1", to=93.2), "'last' differs"),
        (set_in("history", 0, "metrics", "student", "top5", to=93.2), "'last' differs"),
        (set_in("best_on_test", "metrics", "student", "top1", to=93.2), "'best_on_test' is not"),
        (set_in("best_on_test", "epoch", to=2), "'best_on_test' is not the epoch of 'history'"),
        (set_in("best_on_test", to=None), "'best_on_test' is not the epoch of 'history'"),
        (set_in("history", 0, "epoch", to=2), "not those that the suite evaluates"),
        (set_in("history", 0, "metrics", to={}), "an epoch of 'history' has no student"),
        (set_in("history", to=[]), "'last' differs from the last epoch"),
        (set_in("last", to={}), "a finished run has a cost and a student"),
        (set_in("cost", to=None), "a finished run has a cost and a student"),
    ],
)
def test_a_wrong_result_says_why_and_the_rest_is_shown(tmp_path, change, words):
    saved(tmp_path, change)
    write_result(tmp_path, made("one"))
    report = make_report(tmp_path, None, "terminal", "baseline")
    (damaged,) = report.damaged
    assert words in damaged.reason
    assert "one" in report.text and "dml" not in report.text


def folder(file: Path) -> None:
    file.mkdir()


def fifo(file: Path) -> None:
    os.mkfifo(file)


def huge(file: Path) -> None:
    with file.open("wb") as stream:
        stream.truncate(100 * 2**20)


def device(file: Path) -> None:
    file.symlink_to("/dev/zero")


def deep(file: Path) -> None:
    file.write_text("[" * 100_000)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (folder, "not a regular file"),
        (fifo, "not a regular file"),
        (device, "not a regular file"),
        (huge, "it has 100 MiB, which is more than the limit of 32 MiB"),
        (deep, "recursion limit"),
    ],
)
def test_other_files_in_the_results_folder_are_not_read(tmp_path, make, words):
    file = saved(tmp_path)
    file.unlink()
    make(file)
    write_result(tmp_path, made("one"))
    found = {type(item): item for item in iter_results(tmp_path)}
    assert words in found[DamagedFile].reason
    assert found[Result].identity.method == "one"


def test_an_escape_sequence_never_reaches_the_terminal(tmp_path, kdbench):
    strange = tmp_path / "suite" / "net" / f"dml{ESCAPE}"
    strange.mkdir(parents=True)
    (strange / f"seed{ESCAPE}.json").write_text(json.dumps({ESCAPE: 1}))
    write_result(tmp_path, made("one", environment={"step": ESCAPE}))
    write_result(tmp_path, made("dml", environment={"step": "eager"}))
    write_result(tmp_path, made("kdcl", suite_hash=ESCAPE))
    for form in ("terminal", "markdown", "latex", "csv", "json"):
        code, out, error = kdbench("report", "--results-dir", str(tmp_path), "--format", form)
        assert code == 2 and error.count("\n") == 1
        assert "one" in out and r"seed\x1b[31mred" in error
        assert {"\x1b", "\x07"}.isdisjoint(out + error)


def test_markup_in_a_name_is_text_in_markdown():
    name = "dml@note=<script>alert(1)<script>|`x`[a](b)"
    text = render(leaderboard(runs_frame([made(name)])), "markdown")
    assert "<script" not in text and "](" not in text
    assert r"\|\`x\`" in text


@pytest.mark.parametrize(
    ("suite", "architecture", "method"),
    [("cifar100@epochs=2,precision=bf16", "resnet56+resnet20", "dml@temperature=3.0")],
)
def test_names_that_kdbench_gives_are_read(tmp_path, suite, architecture, method):
    result = made(method, suite=None, architecture=architecture)
    changed = result.identity.model_copy(update={"suite": suite})
    write_result(tmp_path, result.model_copy(update={"identity": changed}))
    (found,) = iter_results(tmp_path)
    assert isinstance(found, Result) and found.identity == changed


def test_a_suite_file_with_a_strange_name_is_refused(tmp_path, kdbench):
    file = tmp_path / f"tiny{ESCAPE}.toml"
    file.write_text(Path("tiny.toml").read_text())
    code, _, error = kdbench("run", "--suite", str(file), "--dry-run")
    assert code == 2 and "name: must be a folder name" in error
    assert "\x1b" not in error and error.count("\n") == 1
    assert load_suite("tiny.toml").name == "tiny"
