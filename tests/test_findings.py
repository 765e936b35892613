"""The figures in docs/findings.md are those of the results in this repository."""

import findings


def test_the_page_shows_the_values_of_the_results():
    page = findings.PAGE.read_text(encoding="utf-8")
    assert findings.filled(page) == page
