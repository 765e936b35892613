"""Results and checkpoints belong to the images and labels that they were trained on."""

import re
from pathlib import Path

import pytest
import tiny_data
from conftest import Watcher, is_one_sentence
from encoded_data import content, opened, photo_suite, write_folders, write_parquet
from made_results import CIFAR, made, made_seeds

from kdbench.data import Images, data_digest
from kdbench.paths import SUITES
from kdbench.report.analysis.cost import cost_frame
from kdbench.report.analysis.summary import leaderboard, runs_frame
from kdbench.report.tables.render import render
from kdbench.results.files import read_result


def write(permutation: list[int]) -> None:
    """Write the data with permuted classes."""
    rows = {
        split: [(image, permutation[label]) for image, label in images]
        for split, images in tiny_data.content().items()
    }
    write_parquet(Path("data"), rows)


ORIGINAL, SWAPPED = [*range(10)], [1, 0, *range(2, 10)]


@pytest.fixture
def train(kdbench):
    text = re.sub("sha256 = .*", "", (SUITES / "digits.toml").read_text())
    for old, new in (
        ('embedded = "digits"', 'hub = "nobody/nothing"'),
        ("= 1437", "= 40"),
        ("= 360", "= 20"),
        ("= 64", "= 20"),
        ("epochs = 8", "epochs = 2"),
        ("[4, 6]", "[1]"),
    ):
        text = text.replace(old, new)
    Path("mine.toml").write_text(text)
    command = ("run", "--suite", "mine.toml", "--methods", "baseline", "--data-dir", "data")
    return lambda *arguments: kdbench(*command, *arguments)


def test_a_result_of_other_labels_is_in_the_way_until_it_is_replaced(train):
    file = Path("results/mine/resnet8/baseline/seed0.json")
    write(SWAPPED)
    assert train()[0] == 0
    swapped = read_result(file)
    assert len(swapped.data) == 16
    assert train()[0] == 0 and read_result(file) == swapped  # of the same data: not run again
    write(ORIGINAL)
    for arguments in ((), ("--seeds", "2")):
        code, _, err = train(*arguments)
        assert code == 2 and is_one_sentence(err)
        assert "was made with other images or labels" in err and "--overwrite-stale" in err
    assert train("--overwrite-stale")[0] == 0
    assert read_result(file).data != swapped.data
    Path("data").rename("elsewhere")
    assert train()[0] == 0  # the results can be shown without the data


def test_a_run_does_not_resume_from_a_checkpoint_of_other_labels(make_run, images):
    with pytest.raises(KeyboardInterrupt):
        make_run("baseline", watcher=Watcher(stop_after=6)).train()
    watcher = Watcher()
    other = Images(images[0].pixels, images[0].labels.roll(1))
    run = make_run("baseline", watcher=watcher, train=other)
    assert run.train().data == run.data and watcher.steps == 12
    (said,) = watcher.messages
    assert "of another version of its suite, its data" in said


def test_the_digest_of_encoded_images_covers_labels_and_every_class(tmp_path):
    rows = content()
    swapped = {
        split: [(image, SWAPPED[label]) for image, label in photos]
        for split, photos in rows.items()
    }
    original, same, other = (
        data_digest(*opened(photo_suite(), write_folders(tmp_path / name, photos)))
        for name, photos in (("a", rows), ("b", rows), ("c", swapped))
    )
    assert original == same != other


FIRST, SECOND = {"data": "1" * 16}, {"data": "2" * 16}


def test_results_of_other_data_are_other_rows():
    methods = ("baseline", "dml")
    runs = [made(m, s, 50.0 + s).model_copy(update=FIRST) for m in methods for s in range(2)]
    runs[-1] = runs[-1].model_copy(update=SECOND)
    board = leaderboard(runs_frame(runs)).set_index("method")
    assert board.n["dml (data 11111111)"] == board.n["dml (data 22222222)"] == 1
    assert board.verdict["dml (data 22222222)"] == ""
    assert "different precision, images, data or" in render(board.reset_index(), "terminal")
    assert cost_frame(runs[2:]).key.nunique() == 2


@pytest.mark.parametrize("checked", [True, False])
def test_results_without_a_digest_count_as_having_it_if_the_suite_has_checksums(checked):
    results = made_seeds("dml", [50.0, 51.0], suite=CIFAR)
    results[1] = results[1].model_copy(update=FIRST)
    if not checked:
        for result in results:
            for split in ("train", "test"):
                result.protocol["data"][split]["sha256"] = None
    board = leaderboard(runs_frame(results))
    assert board.n.tolist() == ([2] if checked else [1, 1])
    assert (board.method == "dml").any()
