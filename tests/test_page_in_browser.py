"""Tests of the page in a browser: opening, sorting, filtering, themes and small screens."""

from pathlib import Path

import pytest
from browser import CHROMIUM, opened
from made_results import FLOPS
from made_results import drawable as made
from test_page import HOSTILE, hostile_page, page_of

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed"),
]

OPEN_ALL = "document.querySelectorAll('details').forEach(d => { d.open = true; })"
PARTS = {
    *("Leaderboard", "Accuracy against cost", "At equal cost", "Student by seed", "Roles"),
    *("Training curves", "Loss terms", "Runs"),
}
TOPS = {"baseline": 50.0, "mid": 60.0, "low": 9.5, "top": 70.25, "lost": None}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    results = [made(m, 0, top1, flops=FLOPS * (i + 1)) for i, (m, top1) in enumerate(TOPS.items())]
    results.append(made("baseline", 1, 52.0))
    file = tmp_path_factory.mktemp("page") / "index.html"
    file.write_text(page_of(*results))
    return file


@pytest.fixture
def page(file):
    with opened(file) as page:
        yield page


def methods(page):
    return page.eval_on_selector_all(
        "tbody tr[data-method]", "rows => rows.filter(r => !r.hidden).map(r => r.dataset.method)"
    )


def heading(page, name):
    return page.get_by_role("columnheader", name=name).get_by_role("button")


def test_the_page_opens_and_filters_without_errors_or_requests(page, file):
    page.locator("details").first.click()
    assert (page.complaints, page.requests) == ([], [file.as_uri()])
    assert page.locator("figure svg").count() == 5
    assert heading(page, "images/s").is_enabled()
    page.get_by_role("searchbox").fill("LO")
    assert sorted(methods(page)) == ["lost", "low"]
    assert page.locator("details.runs:visible").count() == 2
    assert page.get_by_role("status").inner_text() == "2 of 5"
    page.get_by_role("searchbox").fill("")
    assert len(methods(page)) == 5


def test_the_page_in_docs_has_every_section():
    file = Path(__file__).parents[1] / "docs" / "leaderboard" / "index.html"
    with opened(file) as page:
        found = page.locator("section.board").first.locator("h3").all_text_contents()
        assert set(found) >= PARTS
        for part in ("Published by others", "Fidelity"):
            assert page.locator("h2", has_text=part).count() == 1
        assert (page.complaints, page.requests) == ([], [file.as_uri()])


def test_a_click_sorts_by_value_and_a_second_reverses(page):
    top1 = heading(page, "student top-1 %")
    top1.click()
    assert methods(page) == ["top", "mid", "baseline", "low", "lost"]
    top1.click()
    assert methods(page) == ["low", "baseline", "mid", "top", "lost"]  # 9.5 before 60
    assert page.locator("th[aria-sort]").count() == 1
    assert page.locator("th[aria-sort=ascending]").inner_text().startswith("student top-1 %")
    heading(page, "method").click()
    assert methods(page) == ["baseline", "lost", "low", "mid", "top"]


def test_the_keyboard_sorts_and_the_skip_link_comes_first(page):
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.getAttribute('href')") == "#main"
    assert page.locator(".skip").bounding_box()["x"] >= 0
    heading(page, "method").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")
    assert methods(page) == ["top", "mid", "low", "lost", "baseline"]
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    assert methods(page) == ["top", "mid", "baseline", "low", "lost"]
    assert page.evaluate("document.activeElement.matches(':focus-visible')")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_theme_follows_the_system_and_the_button(file, scheme):
    style = "e => [getComputedStyle(e).backgroundColor, getComputedStyle(e).fill]"
    colours = f"[document.body, document.querySelector('svg text')].map({style})"
    with opened(file, color_scheme=scheme) as page:
        other = "dark" if scheme == "light" else "light"
        before = page.evaluate(colours)
        page.get_by_role("button", name=other.capitalize(), exact=True).click()
        after = page.evaluate(colours)
        assert before[0][0] != after[0][0] and before[1][1] != after[1][1]
        page.reload()
        assert page.evaluate(colours) == after
        page.emulate_media(color_scheme=other)
        assert page.evaluate(colours) == after
        page.emulate_media(media="print")
        assert page.evaluate("getComputedStyle(document.documentElement).colorScheme") == "light"


def test_it_fits_a_phone(file):
    with opened(file, viewport={"width": 360, "height": 800}) as page:
        page.evaluate(OPEN_ALL)
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        table = page.locator(".scroll").first
        assert table.evaluate("box => box.scrollWidth > box.clientWidth")


def test_the_page_is_complete_without_scripts(file):
    with opened(file, java_script_enabled=False) as page:
        assert page.locator("tbody tr[data-method]").count() == 5
        assert not page.get_by_role("searchbox").is_visible()
        assert not page.locator("#theme").is_visible()


def test_hostile_names_run_no_script_on_the_page(tmp_path):
    file = tmp_path / "index.html"
    file.write_text(hostile_page())
    with opened(file, viewport={"width": 360, "height": 800}) as page:
        page.evaluate(OPEN_ALL)
        heading(page, "method").click()
        page.get_by_role("searchbox").fill("<script>")
        assert methods(page) == [HOSTILE]
        assert (page.complaints, page.requests) == ([], [file.as_uri()])
        assert page.locator("script").count() == 1 and page.locator("img").count() == 0
        assert page.evaluate("document.documentElement.scrollWidth") == 360
