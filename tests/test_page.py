"""Tests of the page: its content, and its safety against malicious results."""

import html.parser
import itertools
import re
from pathlib import Path

import pytest
from conftest import is_one_sentence
from made_results import FLOPS
from made_results import drawable as made
from made_results import made as plain

from kdbench.report.page.render import render_page
from kdbench.results.files import DamagedFile, write_result
from kdbench.suite.load import load_suite

HOSTILE = (
    """</script><script>alert(1)</script><img src=x onerror=alert()>'"${x}{{ 1234*5678 }}$\\x$"""
)
HOSTILE += "x" * 90  # no place for a line to break
LINKS = {"src", "href", "action", "data", "poster", "srcset", "xlink:href"}


class Elements(html.parser.HTMLParser):
    """Parser that collects start tags, text and scripts."""

    def __init__(self, page: str):
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.scripts = "", []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.found and self.lasttag == "script" and self.cdata_elem == "script":
            self.scripts.append(data)
        self.text += data


def page_of(*results, damaged=()):
    return render_page(results, "baseline", damaged=damaged)


def hostile_result():
    result = made(HOSTILE, options={HOSTILE: HOSTILE}, notes={HOSTILE: {HOSTILE: [HOSTILE]}})
    history = [
        epoch.model_copy(update={"losses": {HOSTILE: 1.0}, "metrics": epoch.metrics})
        for epoch in result.history
    ]
    last = result.last | {HOSTILE: result.last["student"]}
    identity = result.identity.model_copy(update={"suite": HOSTILE, "architecture": HOSTILE})
    protocol = result.protocol | {"description": HOSTILE}
    changes = {"history": history, "last": last, "identity": identity, "protocol": protocol}
    return result.model_copy(update=changes)


def hostile_page():
    lost = made(HOSTILE, 1, None, reason=HOSTILE)
    lost = lost.model_copy(update={"identity": hostile_result().identity})
    return page_of(hostile_result(), lost, damaged=[DamagedFile(Path(HOSTILE), HOSTILE)])


def test_equal_results_give_equal_bytes():
    results = [made(method, seed) for method in ("baseline", "dml") for seed in range(2)]
    assert page_of(*results) == page_of(*results)


def test_the_page_fetches_nothing():
    elements = Elements(page_of(made("baseline"), made("dml")))
    links = [
        value
        for _, attributes in elements.found
        for name, value in attributes.items()
        if name in LINKS
    ]
    assert links and all(link.startswith("#") for link in links)
    assert not {tag for tag, _ in elements.found} & {"link", "iframe", "object", "embed", "base"}
    assert "@import" not in elements.text
    assert set(re.findall(r"url\((.)", page_of(made("baseline")))) <= {"#"}


def test_the_content_security_policy_allows_the_script():
    elements = Elements(page_of(made("baseline")))
    (policy,) = [a["content"] for tag, a in elements.found if tag == "meta" and "content" in a][:1]
    assert policy.startswith("default-src 'none'; ") and "unsafe-eval" not in policy
    assert [tag for tag, _ in elements.found].count("script") == 1 == len(elements.scripts)


def test_hostile_results_are_shown_as_text():
    plain, hostile = Elements(page_of(made("a"), made("a", 1, None))), Elements(hostile_page())
    kinds = {tag for tag, _ in plain.found}
    assert {tag for tag, _ in hostile.found} <= kinds | {"ul", "li", "p"}
    assert hostile.scripts == plain.scripts
    assert not [a for _, a in hostile.found for name in a if name.startswith("on")]
    assert HOSTILE in hostile.text and str(1234 * 5678) not in hostile.text
    methods = [a["data-method"] for _, a in hostile.found if "data-method" in a]
    assert methods == [HOSTILE, HOSTILE]


def test_ranking_means_over_unequal_numbers_of_seeds_gives_a_note():
    several = [made("baseline", seed) for seed in range(2)]
    said = "Numbers of seeds differ: dml 1, all others 2."
    assert said in Elements(page_of(*several, made("dml"))).text
    assert "Ranked by" not in page_of(*several)


def test_control_characters_are_replaced():
    page = page_of(made("a", notes={"note": "a\x00b\x1b[31m\u202egnp"}))
    assert "a\ufffdb\ufffd[31m\ufffdgnp" in page
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", page)


def test_headings_are_in_order_and_ids_unique():
    elements = Elements(page_of(made("baseline"), made("dml"), other_board()))
    levels = [int(tag[1]) for tag, _ in elements.found if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    ids = [attributes["id"] for _, attributes in elements.found if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = {a["href"][1:] for _, a in elements.found if a.get("href", "").startswith("#")}
    assert targets <= set(ids)


def other_board():
    result = made("dml")
    identity = result.identity.model_copy(update={"architecture": "resnet20"})
    return result.model_copy(update={"identity": identity})


def test_two_recipes_of_one_name_are_reported():
    other = made("dml", identity=made("dml").identity.model_copy(update={"suite_hash": "0" * 16}))
    page = page_of(made("baseline"), other)
    assert "2 recipes share the name &#39;digits@epochs=4&#39;" in page
    assert re.search(r'<h2 id="board-1">digits@epochs=4 \(0{8}\), resnet8</h2>', page)
    assert "recipes share" not in page_of(made("baseline"), made("dml"))


def test_each_board_is_a_section_with_its_recipe():
    page = page_of(made("baseline"), other_board())
    headings = re.findall(r'<h2 id="board-\d+">(.*?)</h2>', page)
    assert headings == ["digits@epochs=4, resnet20", "digits@epochs=4, resnet8"]
    assert "a smoke test that ranks nothing; here with epochs=4." in page
    assert "digits, 1,437 training images, 10 classes; 4 epochs, batch 64" in page


def test_a_control_at_equal_cost_has_a_table():
    longer = load_suite("digits").with_epochs(12)
    cost = {"training_flops": 3 * FLOPS}
    control = plain("baseline", top1=55.0, suite=longer, cost=cost, architecture="resnet8")
    results = [made("baseline"), made("dml", flops=3 * FLOPS)]
    assert "At equal cost" not in page_of(*results)
    page = page_of(*results, control)
    title = "digits, resnet8: baseline trained for equal FLOPs."
    row = r"<td[^>]*>55.00</td><td[^>]*>12</td><td[^>]*>-5.00</td>"
    assert len(re.findall(row, page)) == 1
    first, second = re.findall(f'<p class="quiet">{title}(.*?)</p>', page, flags=re.DOTALL)
    assert first == "" and second.strip().startswith('<a href="#board-1">The table stands above')


def test_a_run_shows_its_command_or_why_it_has_none():
    page = page_of(made("baseline", options={"temperature": 2.0}), made("dml", 0, None))
    assert "kdbench run --methods baseline" in page and "temperature = 2" in page
    assert "&#39;ce/student&#39; is nan in epoch 3" in page
    assert '<span class="lost">seed 0: diverged</span>' in page
    assert "0 (1 diverged)" in page


@pytest.mark.parametrize(
    "results",
    [
        [made("baseline")],
        [made("dml", 0, None)],
        [made("dml", 0, None, history=[])],
        [made("dml", flops=None, jobs=3)],
        [made("baseline", protocol={"schedule": {"epochs": 4}})],
        [made("a" * 300), made("b" * 300)],
        [made(f"method{i}", top1=40.0 + i / 7) for i in range(30)],
    ],
    ids=["one", "diverged", "no epoch", "no cost", "unknown protocol", "long names", "thirty"],
)
def test_odd_boards_have_a_page(results):
    page = page_of(*results)
    assert page.count("<tr data-method=") == len({r.identity.method for r in results})
    assert page.rstrip().endswith("</html>")


def test_fidelity_is_left_out_where_there_are_no_docs(monkeypatch, tmp_path):
    file = tmp_path / "fidelity.md"
    monkeypatch.setattr("kdbench.report.page.render.FIDELITY", file)
    assert 'id="fidelity"' not in page_of(made("dml"))
    file.write_text(
        "# Fidelity\n\nIn `float64`.\n\n| method | losses |\n|---|---|\n| dml | 2e-16 |\n"
    )
    page = page_of(made("dml"))
    assert 'id="fidelity"' in page and "In float64." in page
    assert re.search(r"<td[^>]*>dml</td><td[^>]*>2e-16</td>", page)


@pytest.fixture
def two_results():
    for result in (made("baseline"), made("dml", top1=51.0)):
        write_result(Path("results"), result)


@pytest.mark.usefixtures("two_results")
def test_report_writes_a_page(kdbench):
    code, out, _ = kdbench("report", "--format", "html", "--output", "deep/er")
    assert (code, out) == (0, "Wrote 'deep/er/index.html'.\n")
    assert Path("deep/er/index.html").read_text() == page_of(
        made("baseline"), made("dml", top1=51.0)
    )
    assert kdbench("report", "--format", "html")[1] == "Wrote 'site/index.html'.\n"


@pytest.mark.usefixtures("two_results")
@pytest.mark.parametrize(
    ("form", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_report_writes_figures_with_equal_bytes(kdbench, form, start):
    kinds = ("cost", "curves", "losses", "roles", "seeds")
    written = []
    for output in ("one", "two"):
        code, out, _ = kdbench("report", "--format", form, "--output", output)
        assert (code, out) == (0, f"Wrote 5 figures to '{output}'.\n")
        files = sorted(Path(output).iterdir())
        assert [f.name for f in files] == [
            f"digits@epochs=4-resnet8-{kind}.{form}" for kind in kinds
        ]
        written.append([file.read_bytes() for file in files])
    assert written[0] == written[1]
    assert all(content.startswith(start) for content in written[0])


@pytest.mark.usefixtures("two_results")
def test_an_unwritable_page_prints_one_sentence(kdbench):
    Path("taken").write_text("")
    for form in ("html", "png"):
        code, _, err = kdbench("report", "--format", form, "--output", "taken")
        assert code == 2 and is_one_sentence(err) and "Cannot write 'taken/" in err
    code, _, err = kdbench("report", "--output", "site")
    assert code == 2 and is_one_sentence(err) and "--format html" in err
    assert not Path("site").exists()


def test_a_page_without_results_prints_one_sentence(kdbench):
    code, _, err = kdbench("report", "--format", "html")
    assert code == 2 and is_one_sentence(err) and "kdbench run" in err
    assert not Path("site").exists()


@pytest.mark.usefixtures("two_results")
def test_the_page_names_a_damaged_file(kdbench):
    Path("results/digits@epochs=4/resnet8/dml/seed7.json").write_text("{")
    code, _, err = kdbench("report", "--format", "html")
    assert code == 2 and "seed7.json" in err
    assert "seed7.json: " in Path("site/index.html").read_text()
