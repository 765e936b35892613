"""Results of earlier versions, and suites of later ones: read as what they are, or refused.

`old_results/` holds a file of each schema version, as some commit made it; nothing rewrites them.
Where fields came that earlier files do not have, the first file of the version is there too.
"""

import csv
import hashlib
import json
from pathlib import Path

import pytest
from conftest import TINY
from made_results import made, saved

from kdbench.report.command import make_report
from kdbench.results.files import load_results, read_result, result_path, write_result
from kdbench.results.schema import SCHEMA_VERSION, Result
from kdbench.suite.load import load_suite

FOLDER = Path(__file__).parent / "old_results"
DIGESTS = {
    "version1-first.json": "1f93d52fd46440461bf69aa510a50efba237d7ebef5ae381f8c2095a0fbf1b4c",
    "version1.json": "5effd65f9cd47e3fd50c7576a1ddfd305be87e810d1003acb2dd5c3bb3183a76",
}


def test_each_schema_version_has_an_unchanged_file():
    files = sorted(FOLDER.iterdir())
    assert {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files} == DIGESTS
    versions = {json.loads(file.read_text())["schema_version"] for file in files}
    assert versions == set(range(1, SCHEMA_VERSION + 1))


@pytest.mark.parametrize("name", DIGESTS)
def test_an_old_result_loads_completely_and_appears_in_the_table(tmp_path, name):
    written = (FOLDER / name).read_bytes()
    content, old = json.loads(written), read_result(FOLDER / name)
    assert isinstance(old, Result) and old.cost is not None
    for key, value in old.model_dump(mode="json").items():
        if isinstance(value, dict):  # of what came later, the default
            value = {k: v for k, v in value.items() if k in content[key]}
        assert value == content.get(key, Result.model_fields[key].default), key
    file = result_path(tmp_path, old.identity)
    file.parent.mkdir(parents=True)
    file.write_bytes(written)
    # Made of the same suite as what is made today, so that both stand in one table.
    assert old.identity.suite_hash == load_suite(old.identity.suite).digest()
    write_result(tmp_path, made("one", top1=99.0, architecture=old.identity.architecture))
    table = make_report(tmp_path, None, "csv", "baseline").text
    first, row = csv.DictReader(table.splitlines())
    assert (first["method"], row["method"]) == ("one", old.identity.method)
    assert float(row["student_top1"]) == content["last"]["student"]["top1"]


@pytest.mark.parametrize("version", [0, SCHEMA_VERSION + 1, str(SCHEMA_VERSION), None])
def test_another_version_is_refused_in_one_sentence(kdbench, version):
    file = saved(Path("results"), lambda content: content.update(schema_version=version))
    (damaged,) = load_results(Path("results"))[1]
    newer = f"newer kdbench (schema_version {version}; this version reads {SCHEMA_VERSION})"
    assert (newer if version == SCHEMA_VERSION + 1 else "schema_version") in damaged.reason
    write_result(Path("results"), made("one"))
    code, out, err = kdbench("report")
    assert code == 2 and err.count("\n") == 1 and str(file) in err
    assert "one" in out and "dml" not in out


@pytest.mark.parametrize("version", ["0", "2", '"1"'])
def test_a_suite_of_another_version_is_refused_in_one_sentence(refused, version):
    Path("tiny.toml").write_text(TINY.replace("version = 1", f"version = {version}"))
    assert "version" in refused("run", "--suite", "tiny.toml", "--dry-run")
