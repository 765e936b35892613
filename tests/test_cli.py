"""The commands as a user types them: what they print, what they write, how they fail."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import TINY, is_one_sentence
from launched import result_of, write_method
from made_results import made

from kdbench import cli
from kdbench.check import command
from kdbench.results.files import write_result
from kdbench.suite.load import load_suite

RAISES = 'raise RuntimeError("no such luck in /home/somebody/secret.py")'
STOPS = "if Path('stop').exists(): raise KeyboardInterrupt"
SCALES = 'return {{n: t * float("{}") for n, t in super().forward(views, labels).items()}}'


def test_run_trains_writes_results_and_prints_the_leaderboard(kdbench, run_tiny, refused):
    code, out, err = run_tiny("--methods", "baseline,dml", "--seeds", "2")
    assert (code, err) == (0, "")
    assert out.startswith("tiny, resnet8\n") and "part of the images, so published" in out
    assert len(list(Path("results").rglob("*.json"))) == 4
    log = Path("runs/tiny/resnet8/dml/seed1/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in log] == [1, 2]
    assert {"ce/student", "kl/student", "ce/peer0"} <= set(json.loads(log[0])["losses"])

    code, markdown, _ = kdbench("report", "--format", "markdown")
    assert code == 0
    assert "### tiny, resnet8" in markdown and "| baseline" in markdown
    rows = json.loads(kdbench("report", "--format", "json")[1])
    assert {row["method"]: row["n"] for row in rows} == {"baseline": 2, "dml": 2}
    table = kdbench("report", "--format", "csv")[1]
    assert table.startswith("suite,suite_hash,architecture,method,n,")
    assert "Did you mean 'baseline'?" in refused("report", "--against", "base")
    assert "Did you mean 'tiny'?" in refused("report", "--suite", "tny")


def test_a_finished_run_is_skipped_without_overwrite(run_tiny):
    run_tiny("--methods", "baseline")
    file = Path("results/tiny/resnet8/baseline/seed0.json")
    written, everything = file.stat().st_mtime_ns, sorted(Path().rglob("*"))
    code, out, _ = run_tiny("--methods", "baseline,ffsd", "--dry-run")
    assert code == 0 and sorted(Path().rglob("*")) == everything
    baseline, ffsd = (line for line in out.splitlines() if "seed0.json" in line)
    assert "exists (finished)" in baseline
    assert "to run" in ffsd and "results/tiny/resnet8/ffsd/seed0.json" in ffsd
    assert "1 of 2 runs to do" in out
    assert run_tiny("--methods", "baseline")[0] == 0
    assert file.stat().st_mtime_ns == written
    assert run_tiny("--methods", "baseline", "--overwrite")[0] == 0
    assert file.stat().st_mtime_ns > written
    code, out, _ = run_tiny("--methods", "dml", "--set", "dml.temperature=2", "--epochs", "1")
    assert code == 0 and "dml@temperature=2.0" in out
    assert Path("results/tiny@epochs=1/resnet8/dml@temperature=2.0/seed0.json").is_file()


def test_another_recipe_under_the_same_name_does_not_replace_a_result(run_tiny, refused):
    plan = ("run", "--suite", "tiny.toml", "--methods", "baseline,label_smoothing")
    run_tiny("--methods", "baseline")
    file = Path("results/tiny/resnet8/baseline/seed0.json")
    before = file.read_bytes()
    Path("tiny.toml").write_text(TINY.replace("batch_size = 40", "batch_size = 20"))
    said = refused("run", "--suite", "tiny.toml", "--methods", "baseline")
    assert "another version of suite 'tiny'" in said and "--overwrite-stale" in said
    assert file.read_bytes() == before

    other = Path("results/tiny/resnet8/label_smoothing/seed0.json")
    code, out, err = run_tiny("--methods", "label_smoothing")
    assert (code, err) == (0, "")
    tables = [table for table in out.split("\n\n") if "method" in table]
    methods = [[line.split()[0] for line in table.splitlines() if "±" in line] for table in tables]
    assert sorted(methods) == [["baseline"], ["label_smoothing"]]
    kept = other.read_bytes()
    code, out, err = run_tiny("--methods", "baseline,label_smoothing", "--seeds", "2", "--dry-run")
    assert code == 2 and is_one_sentence(err) and "--overwrite-stale" in err
    states = [re.split(r"\s{2,}", line)[-2] for line in out.splitlines() if ".json" in line]
    assert states == ["in the way", "exists (finished)", "to run", "to run"]
    other.write_bytes(kept[:1000])
    assert "; 2 files are in the way of this plan;" in refused(*plan)
    other.write_bytes(kept)
    assert run_tiny("--methods", "baseline,label_smoothing", "--overwrite-stale")[0] == 0
    assert file.read_bytes() != before and other.read_bytes() == kept


def test_list_names_suites_methods_and_architectures(kdbench):
    code, out, _ = kdbench("list")
    assert code == 0
    for name in ("cifar100-reduced", "ffsd", "wrn16-2", "278,324", "arXiv:2103.14473"):
        assert name in out
    assert kdbench("--version") == (0, f"kdbench {version('kdbench')}\n", "")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("run --suite cifar10", ["Unknown suite 'cifar10'", "Did you mean 'cifar100'?"]),
        ("run --methods fsd", ["Unknown method 'fsd'", "Did you mean 'ffsd'?"]),
        ("run --methods FFSD", ["Unknown method 'FFSD'", "Did you mean 'ffsd'?"]),
        ("run --methods ,", ["--methods names no method"]),
        ("run --methods ./none.py", ["none.py", "does not exist"]),
        ("run --methods mine", ["For the file in this folder, write './mine.py'.\n"]),
        ("run --architectures resnett20", ["Unknown architecture", "Did you mean 'resnet20'?"]),
        ("run --architectures resnet21", ["Did you mean 'resnet20'?"]),
        ("run --methods ffsd, dml", ["argument 'dml'", "no spaces: --methods ffsd,dml"]),
        ("run --architectures resnet110", ["does not offer the architecture 'resnet110'"]),
        ("run --set dml.temprature=2", ["unknown key 'temprature'", "Did you mean 'temperature'"]),
        ("run --set dml.temperature=cold", ["temperature", "number"]),
        ("run --set dml.temperature=0", ["temperature", "greater than 0"]),
        ("run --set dmll.temperature=1", ["Unknown method in --set 'dmll'", "'dml'"]),
        ("run --methods ffsd --set dml.temperature=2", ["--methods does not name"]),
        ("run --set temperature", ["METHOD.OPTION=VALUE"]),
        ("run --set ffsd.networks=2", ["'ffsd' needs at least 3 networks"]),
        ("run --set baseline.networks=2", ["'baseline' always has 1 network"]),
        ("run --epochs 0", ["--epochs must be at least 1"]),
        ("run --epochs -3", ["--epochs must be at least 1"]),
        ("run --seeds 0", ["--seeds must be at least 1"]),
        ("run --jobs 0", ["--jobs must be at least 1"]),
        ("run --suite cifar100 --data-dir . --dry-run", ["'cifar100'", "in .,", "save_to_disk"]),
        ("report", ["kdbench run"]),
        ("report --format html", ["kdbench run"]),
        ("report --output site", ["--format html"]),
        ("check", ["--all"]),
        ("new mine", ["exists"]),
        ("new ffsd", ["exists"]),
        ("new my-idea", ["not a valid method name"]),
        ("new f", ["conflicts with a name"]),
    ],
)
def test_bad_input_prints_one_sentence_and_writes_nothing(kdbench, command, words):
    Path("mine.py").touch()
    before = sorted(Path().rglob("*"))
    code, out, err = kdbench(*command.split())
    assert (code, out) == (2, "") and is_one_sentence(err)
    assert all(word in err for word in words), err
    assert sorted(Path().rglob("*")) == before


def test_an_unwritable_folder_is_reported_before_training(refused):
    Path("taken").write_text("a file")
    for option in ("--results-dir", "--runs-dir"):
        assert "'taken'" in refused("run", "--suite", "tiny.toml", option, "taken")


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_failing_method_is_recorded_and_the_others_continue(run_tiny, value):
    diverging = write_method("diverges", SCALES.format(value))
    Path("bad.py").write_text("import torch\n\ndef f(:\n")
    methods = f"./bad.py,{diverging},{write_method('breaks', RAISES)},baseline"
    code, out, err = run_tiny("--methods", methods)
    assert code == 1 and err.count("kdbench: ") == err.count("\n") == 4
    assert "bad.py, line 3" in err
    # The step after an infinite loss has no number at all, and so has their mean.
    assert "diverges resnet8 seed 0 diverged: 'ce/student' is nan in epoch 1." in err
    failure = "breaks.py, line 15: RuntimeError: no such luck in secret.py."
    assert f"breaks resnet8 seed 0 failed: {failure}" in err
    assert "baseline" in out and "1 diverged" in out and "1 failed" in out
    statuses = [result_of(method)["status"] for method in ("diverges", "breaks", "baseline")]
    assert statuses == ["diverged", "failed", "finished"]
    code, out, err = run_tiny("--methods", f"{diverging},baseline")
    assert code == 1 and is_one_sentence(err) and "1 diverged" in out
    kept = "diverged before and were not trained again: diverges resnet8 seed 0 "
    assert f"{kept}('ce/student' is nan" in err


def test_a_failed_run_of_any_version_is_retried(run_tiny, refused):
    plan = ("--methods", write_method("breaks", RAISES))
    said = refused("run", "--suite", "tiny.toml", *plan, "--dry-run")
    assert "breaks.py, line 15: RuntimeError" in said
    for batch_size in (40, 40, 20):
        Path("tiny.toml").write_text(TINY.replace("batch_size = 40", f"batch_size = {batch_size}"))
        code, _, err = run_tiny(*plan)
        assert code == 1 and "seed 0 failed: breaks.py, line 15" in err


def test_ctrl_c_reports_what_is_kept_and_the_same_command_resumes(run_tiny):
    plan = ("--methods", f"baseline,{write_method('stops', STOPS)}")
    Path("stop").touch()
    code, _, err = run_tiny(*plan)
    assert code == 130
    assert "1 of 2 runs are done" in err and "same command goes on" in err
    Path("stop").unlink()
    assert run_tiny(*plan)[0] == 0


@pytest.mark.parametrize(
    ("chosen", "spins"),
    [({}, cli.SPIN_COUNT), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_openmp_spin_time_has_a_default_that_the_user_can_override(monkeypatch, chosen, spins):
    monkeypatch.setattr(os, "environ", environment := dict(chosen))
    cli.limit_thread_spinning()
    assert environment.get("GOMP_SPINCOUNT") == spins


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"schema_version": 1}', '{"schema_version": 9}']
)
def test_report_names_a_damaged_file_and_shows_the_rest(kdbench, refused, damage):
    suite = load_suite("tiny.toml")
    for method in ("baseline", "dml"):
        file = write_result(Path("results"), made(method, suite=suite, architecture="resnet8"))
    file.write_text(damage)
    code, out, err = kdbench("report")
    assert code == 2 and is_one_sentence(err) and str(file) in err
    assert "baseline" in out
    assert "--overwrite" in refused("run", "--suite", "tiny.toml", "--methods", "dml")


def test_new_writes_a_method_that_trains_and_refuses_to_overwrite(kdbench, run_tiny, refused):
    code, out, _ = kdbench("new", "my_idea")
    assert code == 0 and "kdbench check ./my_idea.py" in out
    assert "class MyIdea(Method)" in Path("my_idea.py").read_text()
    assert run_tiny("--methods", "./my_idea.py,baseline")[0] == 0
    assert "exists" in refused("new", "my_idea")


def test_check_prints_passed_and_failed_checks(kdbench, monkeypatch):
    monkeypatch.setattr(
        command, "train_in_two_processes", lambda s: {x.entry.name: None for x in s}
    )
    Path("bad.py").write_text("def f(:")
    code, out, err = kdbench("check", "baseline", write_method("breaks", RAISES), "./bad.py")
    assert code == 1
    assert "baseline, targets detached: skipped: " in out
    assert "breaks, losses named and finite: FAILED: breaks.py, line 15: RuntimeError" in out
    assert out.count("breaks.py, line 15: RuntimeError") == 1 and "other checks)" in out
    assert "bad.py, line 1" in err


def test_mixed_architectures_deploy_the_last_network(run_tiny, refused):
    mixed = ("--architectures", "resnet20+resnet8")
    assert run_tiny("--methods", "dml,baseline,kdcl", *mixed)[0] == 0
    for method, trained in (("dml", 78_042 + 272_474), ("baseline", 78_042)):
        file = Path(f"results/tiny/resnet20+resnet8/{method}/seed0.json")
        cost = json.loads(file.read_text())["cost"]
        assert (cost["parameters_trained"], cost["parameters_deployed"]) == (trained, 78_042)
    said = refused("run", "--suite", "tiny.toml", "--methods", "ffsd", *mixed)
    assert "networks of one architecture" in said


@pytest.mark.parametrize(
    ("command", "words", "not_imported"),
    [
        ("--help", ["run", "report"], {"torch", "pandas", "pydantic", "datasets", "accelerate"}),
        ("run --suit x", ["--suite"], {"torch", "pandas"}),
        ("run --methods fsd", ["Did you mean"], {"torch", "pandas"}),
        ("run --suite cifar10", ["Did you mean"], {"torch", "pandas"}),
        ("bench --methods fsd", ["Did you mean"], {"torch", "pandas"}),
        ("gate --methods fsd", ["Did you mean"], {"torch", "pandas"}),
        ("check fsd", ["Did you mean"], {"torch", "pandas"}),
    ],
)
def test_help_and_unknown_names_do_not_import_torch(command, words, not_imported):
    python = [sys.executable, "-X", "importtime", "-m", "kdbench"]  # lists each import
    ended = subprocess.run([*python, *command.split()], capture_output=True, text=True)
    imported = set(re.findall(r"\| +([\w.]+)$", ended.stderr, re.MULTILINE))
    assert "kdbench.cli" in imported and not imported & not_imported
    assert ended.returncode == (0 if command == "--help" else 2)
    shown = ended.stdout if command == "--help" else ended.stderr
    assert all(word in shown for word in words)
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("supported", [True, False])
def test_bf16_on_a_cpu_without_it_gives_a_warning_first(run_tiny, monkeypatch, supported):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    code, _, err = run_tiny("--precision", "bf16", "--dry-run")
    assert code == 0 and ("ten times as long" in err) is not supported
    assert run_tiny("--dry-run")[2] == ""
