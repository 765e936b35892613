"""Tests of leaderboards in the terminal, in Markdown and in LaTeX."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_results import CIFAR, made, made_seeds

from kdbench.errors import UserError
from kdbench.report.analysis.summary import leaderboard, runs_frame
from kdbench.report.command import make_report
from kdbench.report.page.render import render_page
from kdbench.report.tables.columns import DEFAULT, OPTIONAL_COLUMNS, columns
from kdbench.report.tables.latex import escape
from kdbench.report.tables.published import Entry, Source, Table
from kdbench.report.tables.render import render
from kdbench.results.files import write_result
from kdbench.suite.load import load_suite

BASELINE = [70.0, 70.4, 70.1, 69.9, 70.2, 70.3, 70.0, 70.1]
BETTER = [72.1, 72.3, 72.2, 71.8, 72.4, 72.1, 72.2, 72.0]
UNCLEAR = [70.3, 70.2, 70.4, 69.8, 70.5, 70.2, 70.1, 70.3]
SEVERAL = {"baseline": BASELINE, "dml": BETTER, "one": UNCLEAR}
REDUCED = load_suite("cifar100-reduced")
LEFT_OUT = "Columns left out to fit the terminal: "


def board_of(*results, against="baseline"):
    return leaderboard(runs_frame(results), against)


@pytest.fixture(scope="module")
def several():
    return board_of(*(run for name, top1s in SEVERAL.items() for run in made_seeds(name, top1s)))


def cells(board, form="markdown", **options) -> dict[str, dict[str, str]]:
    """Return the cells by method and heading."""
    lines = [line for line in render(board, form, **options).splitlines() if line[:1] == "|"]
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    named = [dict(zip(head, row, strict=True)) for row in rows]
    return {row["method"]: row for row in named}


def test_a_difference_has_an_interval_and_a_verdict(several):
    shown = cells(several)
    row = several.set_index("method").loc["dml"]
    interval = f"[{row.difference_low:+.2f}, {row.difference_high:+.2f}]"
    assert shown["dml"]["vs baseline"] == f"{row.difference:+.2f} {interval}"
    needed = several.set_index("method").seeds_needed["one"]
    verdicts = {method: row["verdict"] for method, row in shown.items()}
    assert verdicts == {"dml": "▲", "one": f"≈ {needed:.0f}", "baseline": "reference"}
    text = render(several, "terminal")
    assert "family-wise error of 5%: ▲ better; ≈ not distinguishable, with the number" in text
    p = cells(several, names=["method", "p", "flips"])
    assert p["dml"]["p"] == "&lt; 0.001" and p["dml"]["p (sign flips)"] == "0.016"
    assert p["baseline"]["p"] == p["baseline"]["p (sign flips)"] == "n/a"


def test_a_worse_method_gets_its_verdict():
    board = board_of(*made_seeds("baseline", BETTER), *made_seeds("dml", BASELINE))
    assert cells(board)["dml"]["verdict"] == "▼" and "▼ worse" in render(board, "terminal")
    assert r"$\downarrow$" in render(board, "latex", names=["verdict"])


def test_seeds_that_are_not_common_are_reported():
    board = board_of(*made_seeds("baseline", BASELINE[:2]), *made_seeds("dml", BETTER[:5]))
    assert cells(board)["dml"]["vs baseline"].endswith("] (2 of 5)")


def test_unequal_numbers_of_seeds_and_several_recipes_give_a_note(several):
    failed = made("one").model_copy(update={"status": "failed", "last": None, "cost": None})
    results = [*made_seeds("baseline", BASELINE[:3]), made("dml"), failed]
    board, page = board_of(*results), render_page(results, "baseline")
    said = "Numbers of seeds differ: dml 1, all others 3."
    assert said in render(board, "terminal") and f"- {said}" in render(board, "markdown")
    assert "$n = 0$ to $3$" in render(board, "latex") and said in page
    assert "Numbers of seeds" not in render(several, "terminal")

    results = [made("a"), made("a", suite_hash="another0hash")]
    said = "2 recipes share the name 'cifar100-reduced'"
    assert render(board_of(*results), "terminal").startswith(said)
    assert "recipes share" not in page
    page = render_page(results, "baseline")
    assert said.replace("'", "&#39;") in page
    assert re.search(r'<h2 id="board-\d">cifar100-reduced \(another0\), resnet20</h2>', page)


@pytest.mark.parametrize(
    ("suite", "said"),
    [
        (CIFAR, "."),
        (CIFAR.with_epochs(30).with_precision("bf16"), "; here with epochs=30, precision=bf16."),
        (REDUCED, ". It uses a part of the images, so published accuracies do not compare."),
    ],
)
def test_a_table_names_its_suite(suite, said):
    said = suite.description + said
    board = board_of(made("baseline", suite=suite))
    assert render(board, "terminal").endswith(f"\n{said}\n")
    assert f"\n- {said}\n" in render(board, "markdown")
    assert said in render(board, "latex")


def test_methods_that_share_a_rank_have_an_equals_sign():
    board = board_of(made("a", 0, 60.0), made("b", 0, 50.0), made("c", 0, 50.0))
    shown = cells(board, names=["method", "rank"])
    assert [row["rank"] for row in shown.values()] == ["1", "2=", "2="]


def test_top5_is_shown_for_many_classes_or_encoded_images_and_no_empty_column(several):
    many = CIFAR.model_copy(update={"data": CIFAR.data.model_copy(update={"classes": 200})})
    for suite, shown in ((CIFAR, False), (many, True), (load_suite("imagenet-reduced"), True)):
        assert ("student top-5 %" in cells(board_of(made("a", suite=suite)))["a"]) is shown
    assert {"cost (x baseline)", "peers %"}.isdisjoint(cells(several)["dml"])
    flops = {"training_flops": 10**15}
    known = cells(board_of(made("baseline", cost=flops), made("dml", cost=flops, peers=(40.0,))))
    assert (known["dml"]["cost (x baseline)"], known["baseline"]["peers %"]) == ("1.00", "n/a")


def test_named_columns_keep_their_order_even_if_empty(several, tmp_path):
    shown = cells(several, names=["method", "cost", "top1", "values"])["one"]
    assert list(shown) == [
        *("method", "cost (x baseline)", "student top-1 %", "student top-1 % by seed")
    ]
    assert shown["student top-1 % by seed"].startswith("0: 70.30, 1: 70.20, ")
    with pytest.raises(UserError, match=r"Unknown column 'ensembl'\. Did you mean 'ensemble'"):
        render(several, "terminal", names=["ensembl"])
    write_result(tmp_path, made("dml"))
    with pytest.raises(UserError, match="--format csv always has all"):
        make_report(tmp_path, None, "csv", "baseline", names=["method"])


def test_the_best_epoch_is_shown_on_request(several):
    assert not any("best" in heading for heading in cells(several)["dml"])
    assert "best on test % (optimistic)" in cells(several, names=["all"])["dml"]


def test_rows_are_sorted_by_the_rounded_values(several):
    for column in columns(several, ["all"], "baseline"):
        for _, row in several.iterrows():
            value = column.value(row)
            known = isinstance(value, float | str) and column.text(row) != "n/a"
            assert value is None or known, column.name
    assert set(OPTIONAL_COLUMNS) < set(DEFAULT)


def test_a_narrow_terminal_drops_the_least_important_columns_and_names_them(several):
    whole = render(several, "terminal")
    narrow = render(several, "terminal", width=100)
    table, _, said = narrow.partition(LEFT_OUT)
    assert max(map(len, whole.splitlines())) > 100 >= max(map(len, table.splitlines()))
    assert said.startswith("params trained / deployed, peak") and "verdict" in table
    assert LEFT_OUT not in render(several, "terminal", width=1000) + whole
    assert LEFT_OUT not in render(several, "terminal", names=["all"], width=100)


def test_a_narrow_terminal_always_shows_the_verdict(several):
    whole = render(several, "terminal").splitlines()
    (dashes,) = (line for line in whole if set(line) == {"-", " "})
    width = dict(zip(re.split(r"\s{2,}", whole[1].strip()), map(len, dashes.split()), strict=True))
    for wide in range(80, 140, 5):
        lines = render(several, "terminal", width=wide).splitlines()
        (dashes,) = (line for line in lines if set(line) == {"-", " "})
        (said,) = (line for line in lines if line.startswith(LEFT_OUT))
        left_out = said.removeprefix(LEFT_OUT).partition(".")[0].split(", ")
        room = wide - len(dashes)
        assert room >= 0 and all(width[heading] + 2 > room for heading in left_out)
        sentence = "Distinguishable from baseline at their numbers of seeds: dml (better)."
        assert (sentence in lines) == ("verdict" in left_out)
    alone = several[several.method == "baseline"]
    assert "istinguishable" not in render(alone, "terminal", width=60)
    level = several.assign(verdict="undecided")
    assert "No difference from baseline is distinguishable" in render(level, "terminal", width=60)


def test_only_a_terminal_makes_tables_fit(kdbench, monkeypatch):
    for method in SEVERAL:
        write_result(Path("results"), made(method))
    monkeypatch.setenv("COLUMNS", "90")
    piped = kdbench("report")[1]
    assert "params" in piped and LEFT_OUT not in piped
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    assert f"{LEFT_OUT}params" in kdbench("report")[1]


def test_latex_has_a_caption_and_escapes_special_characters(several):
    text = render(several, "latex")
    (caption,) = re.findall(r"\\caption\{(.*)\}", text)
    for words in ("cifar100-reduced", "resnet20", "$n = 8$", "baseline"):
        assert words in caption
    assert "$-$" in text and r"$\pm$" in text
    assert escape(r"a_b 50% {x} \y ~^#&$") == (
        r"a\_b 50\% \{x\} \textbackslash{}y \textasciitilde{}\textasciicircum{}\#\&\$"
    )
    assert escape("cifar100-reduced [-0.30, 2]") == "cifar100-reduced [$-$0.30, 2]"


def compiled(body: str, folder: Path) -> str:
    """Return the output of pdflatex for a page of two columns."""
    head = r"\documentclass{article}\usepackage{booktabs}\textwidth=516pt\begin{document}"
    (folder / "t.tex").write_text(head + body + r"\end{document}", encoding="utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    ran = subprocess.run(command, cwd=folder, capture_output=True, text=True, errors="replace")
    assert ran.returncode == 0, ran.stdout[-2000:]
    assert (folder / "t.pdf").stat().st_size > 0
    return ran.stdout


@pytest.mark.skipif(shutil.which("pdflatex") is None, reason="pdflatex is not installed")
def test_latex_compiles_with_article_and_booktabs_and_fits_a_page_by_default(tmp_path):
    name = "dml@note=<b>a_b%#&${}~^\\|\"'`éð中"
    baseline = made_seeds("baseline", BASELINE, suite=CIFAR)
    board = board_of(*baseline, *made_seeds(name, BETTER, suite=CIFAR))
    entry = Entry(architecture="resnet20", method=name, mean=72.0)
    table = Table(dataset="cifar100", protocol="", entries=(entry,))
    body = render(board, "latex", names=["all"], sources=[Source(name="A & B", tables=(table,))])
    assert "A \\& B" in body
    compiled(body, tmp_path)

    board = board_of(*made_seeds("baseline", BASELINE), *made_seeds("label_smoothing", BETTER))
    assert "Overfull" not in compiled(render(board, "latex"), tmp_path)
    assert "Overfull" in compiled(render(board, "latex", names=["all"]), tmp_path)
