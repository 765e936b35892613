"""The figures in docs/findings.md are those of the results in this repository."""

import findings


def test_the_page_holds_what_the_results_say():
    page = findings.PAGE.read_text(encoding="utf-8")
    assert findings.filled(page) == page
