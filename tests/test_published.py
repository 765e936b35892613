"""Tests of published numbers: shown with their protocols, and only where comparable."""

from pathlib import Path

import pytest
from made_results import CIFAR, IMAGENET, made, made_seeds, metrics

from kdbench.report.analysis.summary import leaderboard, runs_frame
from kdbench.report.command import make_report
from kdbench.report.page.render import render_page
from kdbench.report.tables.published import (
    TITLE,
    Source,
    published_cells,
    published_notes,
    read_published,
)
from kdbench.report.tables.render import render
from kdbench.results.files import DamagedFile, iter_results, write_result
from kdbench.results.schema import BestOnTest

RESULTS = Path(__file__).parents[1] / "results"
SOURCE = """
name = "Somebody 2020"
[[tables]]
dataset = "cifar100"
protocol = "Theirs."
epochs = 300
entries = [
    { architecture = "resnet20", method = "dml", top1 = [71.0, 73.0] },
    { architecture = "resnet20", method = "baseline", range = [68.8, 69.1] },
]
"""
LESS = "ours less theirs"
RECIPE = "Li et al. 2022, README: The recipe"
TRAIN = CIFAR.data.train.model_copy(update={"per_class": 499})
PART = CIFAR.model_copy(update={"data": CIFAR.data.model_copy(update={"train": TRAIN})})


def write(folder: Path, text: str) -> list[Source | DamagedFile]:
    file = folder / "published" / "source.toml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    return list(read_published(folder))


def board_of(*results):
    return leaderboard(runs_frame(results))


@pytest.fixture(scope="module")
def committed() -> list[Source]:
    found = list(read_published(RESULTS))
    assert found and all(isinstance(source, Source) for source in found)
    return found


def test_every_committed_number_can_be_shown_and_is_no_result(committed):
    boards = [
        board_of(made("ffsd", suite=suite, architecture=architecture))
        for suite in (CIFAR, IMAGENET)
        for architecture in suite.architectures
    ]
    shown = sum(len(published_cells(committed, board)) for board in boards)
    assert shown == sum(len(t.entries) for source in committed for t in source.tables)
    assert not any("published" in str(found) for found in iter_results(RESULTS))
    for suite, top1s in ((IMAGENET, ["70.87", "69.76"]), (IMAGENET.with_epochs(30), [])):
        board = board_of(made("a", suite=suite, architecture="resnet18"))
        assert [cells["top-1 %"] for cells in published_cells(committed, board)] == top1s


def test_a_published_row_has_its_protocol_and_our_difference(tmp_path):
    sources = write(tmp_path, SOURCE)
    ours = made_seeds("dml", [74.0, 75.0], suite=CIFAR) + [made("baseline", suite=CIFAR)]
    dml, baseline = published_cells(sources, board_of(*ours))
    assert (dml["top-1 %"], dml["runs"], dml["epochs"]) == ("72.00 ± 1.41", "2", "300")
    assert (dml["weight decay"], dml["network"]) == ("not stated", "not stated")
    assert dml[LESS] == "+2.50 (last epoch)"
    assert (baseline["top-1 %"], baseline[LESS]) == ("68.80 to 69.10", "n/a")
    shorter = board_of(*made_seeds("dml", [74.0, 75.0], suite=CIFAR.with_epochs(200)))
    assert published_cells(sources, shorter)[0][LESS] == "n/a"
    unstated = write(tmp_path, SOURCE.replace("epochs = 300\n", ""))
    assert published_cells(unstated, shorter)[0][LESS] == "+2.50 (last epoch)"

    labelled = made("dml", 0, 74.5, suite=CIFAR, environment={"precision": "tf32"})
    board = board_of(labelled, made("one", suite=CIFAR))
    assert sorted(board.method) == ["dml (tf32)", "one (fp32)"]
    assert published_cells(sources, board)[0][LESS] == "+2.50 (last epoch)"


def test_published_best_epochs_are_compared_with_our_best_epochs(tmp_path):
    ours = made_seeds("dml", [74.0, 75.0], suite=CIFAR)
    for seed, top1 in enumerate((76.0, 78.0)):
        best = BestOnTest(epoch=1, metrics={"student": metrics(top1)})
        ours[seed] = ours[seed].model_copy(update={"best_on_test": best})
    column, board = "ours, best on test %", board_of(*ours)
    best = SOURCE.replace("epochs = 300", 'epochs = 300\nepoch = "best on test"')
    dml, baseline = published_cells(write(tmp_path, best), board)
    assert (dml[column], dml[LESS]) == ("77.00 ± 1.41", "+5.00 (best on test)")
    assert (baseline[column], baseline[LESS]) == ("n/a", "n/a")
    for text in (SOURCE, best.replace('"best on test"', '"last"')):
        dml, _ = published_cells(write(tmp_path, text), board)
        assert column not in dml and dml[LESS] == "+2.50 (last epoch)"
    alone = published_cells(write(tmp_path, best), board_of(made("one", suite=CIFAR)))
    assert not any(column in cells for cells in alone)


def test_numbers_without_runs_of_ours_have_no_difference_and_no_rank(tmp_path):
    sources, board = write(tmp_path, SOURCE), board_of(made("one", suite=CIFAR))
    assert published_cells(sources, board)[0][LESS] == "n/a"
    ours, theirs = render(board, "markdown", sources=sources).split(f"### {TITLE}")
    assert "dml" not in ours and "rank" not in theirs


@pytest.mark.parametrize(
    ("suite", "shown"),
    [
        (CIFAR, True),
        (None, False),  # cifar100-reduced: a part of the images
        (CIFAR.with_epochs(100), True),
        (CIFAR.with_epochs(99), False),
        (PART, False),
    ],
)
def test_only_full_schedules_on_all_images_are_matched_with_published_numbers(
    tmp_path, suite, shown
):
    write(tmp_path, SOURCE)
    write_result(tmp_path, made("dml", suite=suite))
    for form in ("terminal", "markdown", "latex"):
        text = make_report(tmp_path, None, form, "baseline").text
        for words in (TITLE, "Somebody 2020", "Somebody 2020: Theirs."):
            assert (words in text) is shown


def test_sources_are_cited_once_with_their_protocols(committed):
    board = board_of(made("ffsd", suite=CIFAR, architecture="resnet20"))
    notes = published_notes(committed, board)
    assert len(notes) == len(set(notes)) > 1
    (authors,) = [note for note in notes if note.startswith(RECIPE)]
    assert authors.endswith("TNNLS 2022, https://github.com/SJLeo/FFSD)")
    assert f"\n{authors}\n" in render(board, "terminal", sources=committed)
    assert f"\n- {RECIPE}" in render(board, "markdown", sources=committed)


def test_the_page_ends_with_unmatched_published_numbers(committed):
    apart = '<h2 id="published">'
    reduced = render_page([made("dml")], "baseline", committed)
    _, _, listed = reduced.partition(apart)
    count = sum(len(table.entries) for source in committed for table in source.tables)
    assert listed.partition("</section>")[0].count("<tr>") == count + 1
    assert RECIPE in listed and "rank</th>" not in listed
    full = made("dml", suite=CIFAR, architecture="resnet32")
    beside, _, rest = render_page([full], "baseline", committed).partition(apart)
    assert "73.68 ± 0.14" in beside and "73.68 ± 0.14" not in rest
    assert "68.80 to 69.10" in rest  # of resnet20


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (('"Somebody 2020"', '"S"\nyaer = 2020'), "unknown key 'yaer'. Did you mean 'year'?"),
        (("[71.0, 73.0]", "[71.0, 173.0]"), "less than or equal to 100"),
        (('method = "dml", top1', 'method = "dml", mean = 7.0, top1'), "give one of top1, mean"),
        (("[71.0, 73.0]", '"71.0"'), "tables.0.entries.0.top1"),
        (("epochs = 300", "epochs = "), "it is not valid TOML"),
    ],
)
def test_a_file_that_is_not_valid_says_why_and_the_rest_is_shown(tmp_path, kdbench, change, words):
    write(tmp_path, SOURCE.replace(*change))
    write_result(tmp_path, made("dml", suite=CIFAR))
    code, out, error = kdbench("report", "--results-dir", str(tmp_path))
    assert code == 2 and words in error and error.count("\n") == 1
    assert "dml" in out and TITLE not in out
