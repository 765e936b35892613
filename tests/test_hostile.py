"""Invalid and malicious files are rejected or escaped, and the rest is shown."""

import json
import os
import re
from pathlib import Path

import pytest
from made_results import CIFAR, made, saved

from kdbench.report.analysis.summary import leaderboard, runs_frame
from kdbench.report.command import make_report
from kdbench.report.tables.render import render
from kdbench.results.files import DamagedFile, iter_results, write_result
from kdbench.results.schema import Result
from kdbench.suite.load import load_suite

ESCAPE = "\x1b[31mred\x07"


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("schema_version", 2, "written by a newer kdbench (schema_version 2"),
        ("identity.method", ESCAPE, "identity.method: must be a folder name"),
        ("identity.suite", "../../x", "identity.suite: must be a folder name"),
        ("identity.architecture", "/etc", "identity.architecture: must be"),
        ("identity.suite", "..", "identity.suite: must be a folder name"),
        ("identity.seed", 10**30, "identity.seed"),
        ("last.student.top1", "70.0", "last.student.top1"),
        ("last.student.top1", float("nan"), "last.student.top1"),
        ("last.student.top1", float("inf"), "last.student.top1"),
        ("last.student.top1", 170.0, "last.student.top1"),
        ("cost.training_seconds", float("inf"), "cost.training_seconds"),
        ("cost.parameters_trained", 10**400, "cost.parameters_trained"),
        ("last.student.top1", 93.2, "'last' differs"),
        ("history.0.metrics.student.top5", 93.2, "'last' differs"),
        ("best_on_test.metrics.student.top1", 93.2, "'best_on_test' is not"),
        ("best_on_test.epoch", 2, "'best_on_test' is not the epoch of 'history'"),
        ("best_on_test", None, "'best_on_test' is not the epoch of 'history'"),
        ("history.0.epoch", 2, "not those that the suite evaluates"),
        ("history.0.metrics", {}, "an epoch of 'history' has no student"),
        ("history", [], "'last' differs from the last epoch"),
        ("last", {}, "a finished run has a cost and a student"),
        ("cost", None, "a finished run has a cost and a student"),
    ],
)
def test_a_wrong_result_says_why_and_the_rest_is_shown(tmp_path, key, value, words):
    def change(content):
        *path, last = key.split(".")
        for name in path:
            content = content[int(name) if name.isdigit() else name]
        content[last] = value

    saved(tmp_path, change)
    write_result(tmp_path, made("one"))
    report = make_report(tmp_path, None, "terminal", "baseline")
    (damaged,) = report.damaged
    assert words in damaged.reason
    assert "one" in report.text and "dml" not in report.text


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (Path.mkdir, "not a regular file"),
        (os.mkfifo, "not a regular file"),
        (lambda f: f.symlink_to("/dev/zero"), "not a regular file"),
        (lambda f: [f.touch(), os.truncate(f, 100 * 2**20)], "it has 100 MiB, .* limit of 32 MiB"),
        (lambda f: f.write_text("[" * 100_000), "recursion limit"),
    ],
)
def test_other_files_in_the_results_folder_are_not_read(tmp_path, make, words):
    file = saved(tmp_path)
    file.unlink()
    make(file)
    suite = CIFAR.model_copy(update={"name": "cifar100@epochs=2,precision=bf16"})
    good = made("dml@temperature=3.0", suite=suite, architecture="resnet56+resnet20")
    write_result(tmp_path, good)  # its names have every character that kdbench uses
    found = {type(item): item for item in iter_results(tmp_path)}
    assert re.search(words, found[DamagedFile].reason)
    assert found[Result].identity == good.identity


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


def test_a_suite_file_with_a_strange_name_is_refused(tmp_path, kdbench):
    file = tmp_path / f"tiny{ESCAPE}.toml"
    file.write_text(Path("tiny.toml").read_text())
    code, _, error = kdbench("run", "--suite", str(file), "--dry-run")
    assert code == 2 and "name: must be a folder name" in error
    assert "\x1b" not in error and error.count("\n") == 1
    assert load_suite("tiny.toml").name == "tiny"
