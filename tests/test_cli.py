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

from kdbench import cli
from kdbench.check import command
from kdbench.engine.run import Run

DIVERGES = """
from torch import nn
from kdbench.method import Method
from kdbench.methods.baseline import Baseline

class Diverges(Baseline):
    def forward(self, views, labels):
        terms = super().forward(views, labels)
        return {name: term * float("{value}") for name, term in terms.items()}
"""
BREAKS = """
from kdbench.methods.baseline import Baseline

class Breaks(Baseline):
    def forward(self, views, labels):
        raise RuntimeError("no such luck in /home/somebody/secret.py")
"""


def test_run_trains_writes_results_and_prints_the_leaderboard(run_tiny):
    code, out, err = run_tiny("--methods", "baseline,dml", "--seeds", "2")
    assert code == 0, err
    assert out.startswith("tiny, resnet8\n") and "It uses a part of the images, so published" in out
    assert err == ""
    files = sorted(str(file) for file in Path("results").rglob("*.json"))
    assert files == [
        f"results/tiny/resnet8/{method}/seed{seed}.json"
        for method in ("baseline", "dml")
        for seed in (0, 1)
    ]
    log = Path("runs/tiny/resnet8/dml/seed1/log.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in log] == [1, 2]
    assert {"ce/student", "kl/student", "ce/peer0"} <= set(json.loads(log[0])["losses"])


def test_a_finished_run_is_skipped_without_overwrite(run_tiny):
    run_tiny("--methods", "baseline")
    file = Path("results/tiny/resnet8/baseline/seed0.json")
    before = file.stat().st_mtime_ns
    assert run_tiny("--methods", "baseline")[0] == 0
    assert file.stat().st_mtime_ns == before
    assert run_tiny("--methods", "baseline", "--overwrite")[0] == 0
    assert file.stat().st_mtime_ns > before


def test_another_recipe_under_the_same_name_does_not_replace_a_result(run_tiny):
    run_tiny("--methods", "baseline")
    file = Path("results/tiny/resnet8/baseline/seed0.json")
    before = file.read_bytes()
    Path("tiny.toml").write_text(TINY.replace("batch_size = 40", "batch_size = 20"))
    code, _, err = run_tiny("--methods", "baseline")
    assert code == 2
    assert is_one_sentence(err)
    assert "another version of suite 'tiny'" in err and "--overwrite-stale" in err
    assert file.read_bytes() == before
    other = Path("results/tiny/resnet8/label_smoothing/seed0.json")
    assert run_tiny("--methods", "label_smoothing")[0] == 0
    kept = other.read_bytes()
    code, out, err = run_tiny("--methods", "baseline,label_smoothing", "--seeds", "2", "--dry-run")
    assert code == 2 and is_one_sentence(err) and "--overwrite-stale" in err
    states = [re.split(r"\s{2,}", line)[-2] for line in out.splitlines() if ".json" in line]
    assert states == ["in the way", "exists (finished)", "to run", "to run"]
    other.write_bytes(kept[:1000])
    code, _, err = run_tiny("--methods", "baseline,label_smoothing")
    assert code == 2 and is_one_sentence(err) and "; 2 files are in the way of this plan;" in err
    other.write_bytes(kept)
    assert run_tiny("--methods", "baseline,label_smoothing", "--overwrite-stale")[0] == 0
    assert file.read_bytes() != before and other.read_bytes() == kept


def test_options_and_epochs_define_separate_runs(run_tiny):
    code, out, _ = run_tiny("--methods", "dml", "--set", "dml.temperature=2", "--epochs", "1")
    assert code == 0
    assert Path("results/tiny@epochs=1/resnet8/dml@temperature=2.0/seed0.json").is_file()
    assert "dml@temperature=2.0" in out


def test_dry_run_prints_the_plan_and_writes_nothing(run_tiny):
    run_tiny("--methods", "baseline")
    before = sorted(Path().rglob("*"))
    code, out, _ = run_tiny("--methods", "baseline,ffsd", "--dry-run")
    assert code == 0
    assert sorted(Path().rglob("*")) == before
    baseline, ffsd = (line for line in out.splitlines() if "seed0.json" in line)
    assert "exists (finished)" in baseline
    assert "to run" in ffsd and "results/tiny/resnet8/ffsd/seed0.json" in ffsd
    assert "1 of 2 runs to do" in out


def test_dry_run_says_where_the_data_are_missing(kdbench, tmp_path):
    code, _, err = kdbench("run", "--suite", "cifar100", "--data-dir", str(tmp_path), "--dry-run")
    assert code == 2
    assert is_one_sentence(err)
    assert "cifar100" in err and str(tmp_path) in err and "save_to_disk" in err


def test_list_names_suites_methods_and_architectures(kdbench):
    code, out, _ = kdbench("list")
    assert code == 0
    for name in ("cifar100-reduced", "ffsd", "wrn16-2", "278,324", "arXiv:2103.14473"):
        assert name in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--suite", "cifar10"], ["Unknown suite 'cifar10'", "Did you mean 'cifar100'?"]),
        (["--methods", "fsd"], ["Unknown method 'fsd'", "Did you mean 'ffsd'?"]),
        (["--methods", "FFSD"], ["Unknown method 'FFSD'", "Did you mean 'ffsd'?"]),
        (["--methods", ","], ["--methods names no method"]),
        (["--methods", "./none.py"], ["none.py", "does not exist"]),
        (["--architectures", "resnett20"], ["Unknown architecture", "Did you mean 'resnet20'?"]),
        (["--architectures", "resnet21"], ["Did you mean 'resnet20'?"]),
        (
            ["--methods", "ffsd,", "dml"],
            ["argument 'dml'", "no spaces: --methods ffsd,dml"],
        ),
        (["--architectures", "resnet110"], ["does not offer the architecture 'resnet110'"]),
        (["--set", "dml.temprature=2"], ["unknown key 'temprature'", "Did you mean 'temperature'"]),
        (["--set", "dml.temperature=cold"], ["temperature", "number"]),
        (["--set", "dml.temperature=0"], ["temperature", "greater than 0"]),
        (["--set", "dmll.temperature=1"], ["Unknown method in --set 'dmll'", "'dml'"]),
        (["--methods", "ffsd", "--set", "dml.temperature=2"], ["--methods does not name"]),
        (["--set", "temperature"], ["METHOD.OPTION=VALUE"]),
        (["--set", "ffsd.networks=2"], ["'ffsd' needs at least 3 networks"]),
        (["--set", "baseline.networks=2"], ["'baseline' always has 1 network"]),
        (["--epochs", "0"], ["--epochs must be at least 1"]),
        (["--epochs", "-3"], ["--epochs must be at least 1"]),
        (["--seeds", "0"], ["--seeds must be at least 1"]),
        (["--jobs", "0"], ["--jobs must be at least 1"]),
    ],
)
def test_bad_input_prints_one_sentence_and_writes_nothing(kdbench, arguments, words):
    code, out, err = kdbench("run", *arguments)
    assert (code, out) == (2, "")
    assert is_one_sentence(err)
    assert all(word in err for word in words), err
    assert not Path("results").exists() and not Path("runs").exists()


def test_a_method_file_with_the_name_of_a_method_is_refused(run_tiny):
    Path("mine.py").write_text("")
    code, _, err = run_tiny("--methods", "mine")
    assert code == 2 and is_one_sentence(err)
    assert err.endswith("For the file in this folder, write './mine.py'.\n")


def test_an_unwritable_folder_is_reported_before_training(run_tiny):
    Path("taken").write_text("a file")
    for option in ("--results-dir", "--runs-dir"):
        code, _, err = run_tiny(option, "taken")
        assert code == 2
        assert is_one_sentence(err) and "'taken'" in err


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_failing_method_is_recorded_and_the_others_continue(run_tiny, value):
    Path("diverges.py").write_text(DIVERGES.replace("{value}", value))
    Path("breaks.py").write_text(BREAKS)
    code, out, err = run_tiny("--methods", "./diverges.py,./breaks.py,baseline")
    assert code == 1
    # The step after an infinite loss has no number at all, and so has their mean.
    assert "diverges resnet8 seed 0 diverged: 'ce/student' is nan in epoch 1." in err
    assert (
        "breaks resnet8 seed 0 failed: breaks.py, line 6: RuntimeError: no such luck in secret.py."
        in err
    )
    assert "1 diverged" in out and "1 failed" in out
    statuses = {
        file.parts[3]: json.loads(file.read_text())["status"]
        for file in Path("results").rglob("*.json")
    }
    assert statuses == {"diverges": "diverged", "breaks": "failed", "baseline": "finished"}
    code, out, err = run_tiny("--methods", "./diverges.py,baseline")
    assert code == 1 and is_one_sentence(err) and "1 diverged" in out
    assert (
        "diverged before and were not trained again: diverges resnet8 seed 0 ('ce/student' is nan"
        in err
    )


def test_a_failed_run_of_any_version_is_retried(run_tiny):
    Path("breaks.py").write_text(BREAKS)
    for batch_size in (40, 40, 20):
        Path("tiny.toml").write_text(TINY.replace("batch_size = 40", f"batch_size = {batch_size}"))
        code, _, err = run_tiny("--methods", "./breaks.py")
        assert code == 1 and "seed 0 failed: breaks.py, line 6" in err


def test_ctrl_c_reports_what_is_kept_and_the_same_command_resumes(run_tiny, monkeypatch):
    original = Run.train

    def stop_at_second(run):
        if run.spec.entry.name == "dml":
            raise KeyboardInterrupt
        return original(run)

    monkeypatch.setattr(Run, "train", stop_at_second)
    code, _, err = run_tiny("--methods", "baseline,dml")
    assert code == 130
    assert "1 of 2 runs are done" in err and "same command goes on" in err
    monkeypatch.setattr(Run, "train", original)
    assert run_tiny("--methods", "baseline,dml")[0] == 0


def test_report_formats(kdbench, run_tiny):
    run_tiny("--methods", "baseline,independent", "--seeds", "2")
    code, markdown, _ = kdbench("report", "--format", "markdown")
    assert code == 0
    assert "### tiny, resnet8" in markdown and "| baseline" in markdown
    rows = json.loads(kdbench("report", "--format", "json")[1])
    assert {row["method"]: row["n"] for row in rows} == {"baseline": 2, "independent": 2}
    header = kdbench("report", "--format", "csv")[1].splitlines()[0]
    assert header.startswith("suite,suite_hash,architecture,method,n,")


@pytest.mark.parametrize(
    ("chosen", "spins"),
    [({}, cli.SPIN_COUNT), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_openmp_spin_time_has_a_default_that_the_user_can_override(monkeypatch, chosen, spins):
    monkeypatch.setattr(os, "environ", environment := dict(chosen))
    cli.limit_thread_spinning()
    assert environment.get("GOMP_SPINCOUNT") == spins


def test_report_refuses_misspelled_arguments(kdbench, run_tiny):
    run_tiny("--methods", "baseline")
    for option, value, near in (("--against", "base", "baseline"), ("--suite", "tny", "tiny")):
        code, _, err = kdbench("report", option, value)
        assert code == 2 and is_one_sentence(err) and f"Did you mean '{near}'?" in err


def test_dry_run_of_a_broken_method_prints_one_sentence(run_tiny):
    Path("breaks.py").write_text(BREAKS)
    code, _, err = run_tiny("--methods", "./breaks.py", "--dry-run")
    assert code == 2
    assert is_one_sentence(err) and "breaks.py, line 6: RuntimeError" in err


def test_report_without_results_suggests_a_command(kdbench):
    code, _, err = kdbench("report")
    assert code == 2
    assert is_one_sentence(err) and "kdbench run" in err


@pytest.mark.parametrize(
    "damage", ["", "{", "[]", '{"schema_version": 1}', '{"schema_version": 9}']
)
def test_report_names_a_damaged_file_and_shows_the_rest(kdbench, run_tiny, damage):
    run_tiny("--methods", "baseline")
    bad = Path("results/tiny/resnet8/dml/seed0.json")
    bad.parent.mkdir()
    bad.write_text(damage)
    code, out, err = kdbench("report")
    assert code == 2
    assert "baseline" in out
    assert is_one_sentence(err) and str(bad) in err
    code, _, err = run_tiny("--methods", "dml")
    assert code == 2
    assert is_one_sentence(err) and "--overwrite" in err


def test_new_writes_a_method_that_trains_and_refuses_to_overwrite(kdbench, run_tiny):
    code, out, _ = kdbench("new", "my_idea")
    assert code == 0 and "kdbench check ./my_idea.py" in out
    assert "class MyIdea(Method)" in Path("my_idea.py").read_text()
    assert run_tiny("--methods", "./my_idea.py,baseline")[0] == 0
    for name, words in (
        ("my_idea", "exists"),
        ("ffsd", "exists"),
        ("my-idea", "not a valid method name"),
        ("f", "conflicts with a name"),
    ):
        code, _, err = kdbench("new", name)
        assert code == 2 and is_one_sentence(err) and words in err


def test_check_prints_passed_and_failed_checks(kdbench, monkeypatch):
    monkeypatch.setattr(
        command, "train_in_two_processes", lambda s: {x.entry.name: None for x in s}
    )
    Path("breaks.py").write_text(BREAKS)
    Path("bad.py").write_text("def f(:")
    code, out, err = kdbench("check", "baseline", "./breaks.py", "./bad.py")
    assert code == 1
    assert "baseline, targets detached: skipped: " in out
    assert "breaks, losses named and finite: FAILED: breaks.py, line 6: RuntimeError" in out
    assert out.count("breaks.py, line 6: RuntimeError") == 1 and "other checks)" in out
    assert "bad.py, line 1" in err
    code, _, err = kdbench("check")
    assert code == 2 and is_one_sentence(err)


def test_a_broken_method_file_does_not_stop_the_others(run_tiny):
    Path("bad.py").write_text("import torch\n\ndef f(:\n")
    code, out, err = run_tiny("--methods", "./bad.py,baseline")
    assert code == 1
    assert is_one_sentence(err) and "bad.py, line 3" in err
    assert "baseline" in out


def test_mixed_architectures_deploy_the_last_network(run_tiny):
    architectures = ("--architectures", "resnet20+resnet8")
    code, _, _ = run_tiny("--methods", "dml,baseline,kdcl", *architectures)
    assert code == 0
    for method, trained in (("dml", 78_042 + 272_474), ("baseline", 78_042)):
        file = Path(f"results/tiny/resnet20+resnet8/{method}/seed0.json")
        cost = json.loads(file.read_text())["cost"]
        assert (cost["parameters_trained"], cost["parameters_deployed"]) == (trained, 78_042)
    code, _, err = run_tiny("--methods", "ffsd", *architectures)
    assert code == 2 and is_one_sentence(err) and "networks of one architecture" in err


def test_module_and_unknown_option_through_the_interpreter():
    command = [sys.executable, "-m", "kdbench"]
    shown = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "run" in shown.stdout and "report" in shown.stdout
    refused = subprocess.run([*command, "run", "--suit", "x"], capture_output=True, text=True)
    assert refused.returncode == 2
    assert "--suite" in refused.stderr and "Traceback" not in refused.stderr


def test_version_prints_the_package_version(kdbench):
    assert kdbench("--version") == (0, f"kdbench {version('kdbench')}\n", "")


@pytest.mark.parametrize(
    ("command", "imported"),
    [
        ("--help", {"torch", "pandas", "pydantic", "datasets", "accelerate"}),
        ("run --methods fsd", {"torch", "pandas"}),
        ("run --suite cifar10", {"torch", "pandas"}),
        ("bench --methods fsd", {"torch", "pandas"}),
        ("gate --methods fsd", {"torch", "pandas"}),
        ("check fsd", {"torch", "pandas"}),
    ],
)
def test_help_and_unknown_names_do_not_import_torch(command, imported):
    code = "import sys\nfrom kdbench.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    code += f"assert not {imported} & set(sys.modules)"
    ended = subprocess.run(
        [sys.executable, "-c", code, *command.split()], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr
    assert command == "--help" or "Did you mean" in ended.stderr


@pytest.mark.parametrize("supported", [True, False])
def test_bf16_on_a_cpu_without_it_gives_a_warning_first(run_tiny, monkeypatch, supported):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    code, _, err = run_tiny("--precision", "bf16", "--dry-run")
    assert code == 0 and ("ten times as long" in err) is not supported
    assert run_tiny("--dry-run")[2] == ""
