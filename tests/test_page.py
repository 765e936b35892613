"""Tests of the page: its content, and its safety against malicious results."""

import html.parser
import itertools
import re
from pathlib import Path

import pytest
from made_results import FLOPS
from made_results import drawable as made
from made_results import made as plain

from kdbench.report.page.render import render_page
from kdbench.results.files import DamagedFile, write_result
from kdbench.suite.load import load_suite

THIRTY = [made(f"method{i}", top1=40.0 + i / 7) for i in range(30)]
HOSTILE = (
    """</script><script>alert(1)</script><img src=x onerror=alert()>'"${x}{{ 1234*5678 }}$\\x$"""
)
HOSTILE += "x" * 90  # no place for a line to break
LINKS = {"src", "href", "action", "data", "poster", "srcset", "xlink:href"}


class Elements(html.parser.HTMLParser):
    """Parser that collects start tags, attributes, text and scripts."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text, self.scripts = "", []
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_data(self, data):
        if self.cdata_elem == "script":
            self.scripts.append(data)
        self.text += data

    def values(self, *names: str) -> list[str]:
        return [value for name, value in self.attributes if name in names]


def page_of(*results, damaged=()):
    return render_page(results, "baseline", damaged=damaged)


def changed(result, **identity):
    return result.model_copy(update={"identity": result.identity.model_copy(update=identity)})


def hostile_page():
    named = {"suite": HOSTILE, "architecture": HOSTILE}
    result = changed(made(HOSTILE, options={HOSTILE: HOSTILE}), **named)
    update = {
        "notes": {HOSTILE: {HOSTILE: [HOSTILE]}},
        "history": [e.model_copy(update={"losses": {HOSTILE: 1.0}}) for e in result.history],
        "last": result.last | {HOSTILE: result.last["student"]},
        "protocol": result.protocol | {"description": HOSTILE},
    }
    lost = changed(made(HOSTILE, 1, None, reason=HOSTILE), **named, seed=0)
    damaged = [DamagedFile(Path(HOSTILE), HOSTILE)]
    return page_of(result.model_copy(update=update), lost, damaged=damaged)


@pytest.fixture(scope="module")
def page():
    return page_of(made("baseline"), made("dml"), changed(made("dml"), architecture="resnet20"))


def test_the_page_fetches_nothing_and_its_policy_allows_the_script(page):
    elements = Elements(page)
    links = elements.values(*LINKS)
    assert links and all(link.startswith("#") for link in links)
    assert set(elements.tags).isdisjoint({"link", "iframe", "object", "embed", "base"})
    assert "@import" not in elements.text
    assert set(re.findall(r"url\((.)", page)) <= {"#"}
    policy = elements.values("content")[0]
    assert policy.startswith("default-src 'none'; ") and "unsafe-eval" not in policy
    assert elements.tags.count("script") == 1 == len(elements.scripts)


def test_hostile_results_are_shown_as_text():
    plain, hostile = Elements(page_of(made("a"), made("a", 1, None))), Elements(hostile_page())
    assert set(hostile.tags) <= {*plain.tags, "ul", "li", "p"}
    assert hostile.scripts == plain.scripts
    assert not [name for name, _ in hostile.attributes if name.startswith("on")]
    assert HOSTILE in hostile.text and str(1234 * 5678) not in hostile.text
    assert hostile.values("data-method") == [HOSTILE, HOSTILE]
    page = page_of(made("a", notes={"note": "a\x00b\x1b[31m\u202egnp"}))
    assert "a\ufffdb\ufffd[31m\ufffdgnp" in page
    assert not re.search(r"[\x00-\x08\x0b-\x1f\u202e]", page)


def test_each_board_is_a_section_with_its_recipe(page):
    elements = Elements(page)
    levels = [int(tag[1]) for tag in elements.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    ids = elements.values("id")
    assert len(ids) == len(set(ids))
    assert {href[1:] for href in elements.values("href") if href.startswith("#")} <= set(ids)
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
        pytest.param(THIRTY, marks=pytest.mark.slow),
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
def two_methods():
    results = [made(method, seed) for method in ("baseline", "dml") for seed in range(2)]
    for result in results:
        write_result(Path("results"), result)
    return results


def test_report_writes_a_page_with_equal_bytes(kdbench, refused, two_methods):
    code, out, _ = kdbench("report", "--format", "html", "--output", "deep/er")
    assert (code, out) == (0, "Wrote 'deep/er/index.html'.\n")
    assert Path("deep/er/index.html").read_text() == page_of(*two_methods)
    for form in ("html", "png"):
        said = refused("report", "--format", form, "--output", "deep/er/index.html")
        assert "Cannot write 'deep/er/index.html/" in said
    Path("results/digits@epochs=4/resnet8/dml/seed7.json").write_text("{")
    code, out, err = kdbench("report", "--format", "html")
    assert (code, out) == (2, "Wrote 'site/index.html'.\n") and "seed7.json" in err
    assert "seed7.json: " in Path("site/index.html").read_text()


@pytest.mark.usefixtures("two_methods")
@pytest.mark.parametrize(
    ("form", "start"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")]
)
def test_report_writes_figures_with_equal_bytes(kdbench, form, start):
    kinds = ("cost", "curves", "losses", "roles", "seeds")
    written = []
    for output in ("one", "two"):
        code, out, _ = kdbench("report", "--format", form, "--output", output)
        assert (code, out) == (0, f"Wrote 5 figures to '{output}'.\n")
        written.append({file.name: file.read_bytes() for file in Path(output).iterdir()})
    assert written[0] == written[1]
    assert set(written[0]) == {f"digits@epochs=4-resnet8-{kind}.{form}" for kind in kinds}
    assert all(content.startswith(start) for content in written[0].values())
