"""Results and checkpoints belong to the images and labels that they were trained on."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import Watcher, is_one_sentence
from encoded_data import content, opened, photo_suite, write_folders
from made_results import CIFAR, made_seeds
from tiny_data import TEST, table

from kdbench.data import Images, data_digest
from kdbench.report.analysis.compare import compare
from kdbench.report.analysis.cost import cost_frame
from kdbench.report.analysis.summary import leaderboard, runs_frame
from kdbench.report.tables.render import render
from kdbench.results.files import read_result, write_result

MINE = """
version = 1
description = "images of one's own"
architectures = ["resnet8"]
default_architecture = "resnet8"
networks = 2
seeds = 1
batch_size = 20
evaluation_batch_size = 20
precision = "fp32"
[data]
name = "mine"
hub = "nobody/nothing"
image_column = "image"
label_column = "label"
classes = 10
image_size = 8
train = { split = "train", images = 40 }
test = { split = "test", images = 20 }
[augmentation]
padding = 1
horizontal_flip = false
mean = [0.3, 0.3, 0.3]
std = [0.4, 0.4, 0.4]
[optimizer]
learning_rate = 0.1
momentum = 0.9
nesterov = true
weight_decay = 1e-4
[schedule]
epochs = 2
milestones = [1]
gamma = 0.1
warmup_epochs = 0
"""


def write(permutation: list[int]) -> None:
    """Write the data with permuted classes."""
    folder = Path("data")
    folder.mkdir(exist_ok=True)
    for split, file in (("train", "train-00000-of-00001.parquet"), ("test", TEST)):
        rows = table(split)
        labels = pa.array([permutation[label] for label in rows["label"].to_pylist()])
        pq.write_table(
            rows.set_column(rows.schema.get_field_index("label"), "label", labels), folder / file
        )


ORIGINAL, SWAPPED = [*range(10)], [1, 0, *range(2, 10)]


@pytest.fixture
def train(kdbench):
    Path("mine.toml").write_text(MINE)
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
    labels = images[0].labels.roll(1)
    watcher = Watcher()
    run = make_run("baseline", watcher=watcher, train=Images(images[0].pixels, labels))
    assert run.train().data == run.data and watcher.steps == 12
    (said,) = watcher.messages
    assert "of another version of its suite, its data" in said


def test_the_digest_of_encoded_images_covers_labels_and_every_class(tmp_path):
    rows = content()
    original = data_digest(*opened(photo_suite(), write_folders(tmp_path / "a", rows)))
    same = data_digest(*opened(photo_suite(), write_folders(tmp_path / "b", rows)))
    exchange = {0: 1, 1: 0}
    swapped = {
        split: [(image, exchange.get(label, label)) for image, label in photos]
        for split, photos in rows.items()
    }
    other = data_digest(*opened(photo_suite(), write_folders(tmp_path / "c", swapped)))
    assert original == same != other


def with_data(results, version):
    return [result.model_copy(update={"data": version}) for result in results]


def unchecked(results):
    """Return the results with a suite that has no checksums."""
    for result in results:
        protocol = json.loads(json.dumps(result.protocol))
        for split in ("train", "test"):
            protocol["data"][split]["sha256"] = None
        yield result.model_copy(update={"protocol": protocol})


def test_results_of_other_data_are_other_rows():
    first, second = with_data(made_seeds("dml", [50.0, 51.0]), "1" * 16)
    reference = with_data(made_seeds("baseline", [50.0, 51.0]), "1" * 16)
    other = second.model_copy(update={"data": "2" * 16})
    board = leaderboard(runs_frame([*reference, first, other])).set_index("method")
    assert board.n["dml (data 11111111)"] == board.n["dml (data 22222222)"] == 1
    assert board.verdict["dml (data 22222222)"] == ""
    assert "different precision, images, data or" in render(board.reset_index(), "terminal")
    assert cost_frame([first, other]).key.nunique() == 2


@pytest.mark.parametrize("checked", [True, False])
def test_results_without_a_digest_count_as_having_it_if_the_suite_has_checksums(checked):
    old, new = made_seeds("dml", [50.0, 51.0], suite=CIFAR)
    results = [old, new.model_copy(update={"data": "1" * 16})]
    board = leaderboard(runs_frame(results if checked else unchecked(results)))
    assert board.n.tolist() == ([2] if checked else [1, 1])
    assert (board.method == "dml").any()


def test_results_of_other_data_are_not_compared():
    for folder, version in (("a", "1" * 16), ("b", "2" * 16)):
        for result in with_data(made_seeds("dml", [50.0]), version):
            write_result(Path(folder), result)
    rows = compare("a", "b", Path("results")).rows
    assert {row.verdict for row in rows} == {"only in A", "only in B"}
    assert all(row.notes == ["other data"] for row in rows)
